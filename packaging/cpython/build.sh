# CPython 3.11 with every extension module built in (Setup.local), against the static libraries in $DEPS.
cp "$RECIPES/Setup.local" Modules/Setup.local
# memfd_create is the one function newer than glibc 2.17 that configure finds by compiling, not by linking.
# Every library is named here, or configure asks pkg-config about this machine's.
./configure --prefix=/usr/local --disable-shared --without-ensurepip --disable-test-modules --with-openssl="$DEPS" \
    --without-readline --without-static-libpython --without-doc-strings \
    CC="$CC" OPT="-DNDEBUG -fwrapv -O3 -Wall" CFLAGS="-fPIC" CPPFLAGS="-I$DEPS/include" LDFLAGS="-L$DEPS/lib" \
    PKG_CONFIG=false ZLIB_CFLAGS=" " ZLIB_LIBS="-lz" BZIP2_CFLAGS=" " BZIP2_LIBS="-lbz2" \
    LIBLZMA_CFLAGS=" " LIBLZMA_LIBS="-llzma" LIBSQLITE3_CFLAGS=" " LIBSQLITE3_LIBS="-lsqlite3 -lm" \
    LIBUUID_CFLAGS=" " LIBUUID_LIBS=" " ac_cv_func_memfd_create=no
make -j"$JOBS"
make install DESTDIR="$OUT/prefix"
