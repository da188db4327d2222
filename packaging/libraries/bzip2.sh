# bzip2: its Makefile knows no prefix of ours; one target and one header are all.
make -j"$JOBS" CC="$CC" AR="$AR" RANLIB="$RANLIB" CFLAGS="-O2 -fPIC -D_FILE_OFFSET_BITS=64" libbz2.a
cp libbz2.a "$OUT/lib/"
cp bzlib.h "$OUT/include/"
