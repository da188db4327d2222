# zlib: the library and its two headers, without configure's install, which wants a shared library.
CFLAGS="-O2 -fPIC" ./configure --static --prefix=/usr/local
make -j"$JOBS" libz.a
cp libz.a "$OUT/lib/"
cp zlib.h zconf.h "$OUT/include/"
