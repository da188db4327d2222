# liblzma alone, none of xz's programs.
CFLAGS="-O2 -fPIC" ./configure --prefix=/usr/local --disable-shared --disable-xz --disable-xzdec --disable-lzmadec \
    --disable-lzmainfo --disable-lzma-links --disable-scripts --disable-doc --disable-nls
make -j"$JOBS" -C src/liblzma
cp src/liblzma/.libs/liblzma.a "$OUT/lib/"
cp -r src/liblzma/api/lzma.h src/liblzma/api/lzma "$OUT/include/"
