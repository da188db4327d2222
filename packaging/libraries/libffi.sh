# libffi 3.4.4 calls open_temp_exec_file without declaring it, which clang takes for an error.
CFLAGS="-O2 -fPIC -Wno-implicit-function-declaration" ./configure --prefix="$OUT" --libdir="$OUT/lib" --disable-shared \
    --with-pic --disable-docs --disable-multi-os-directory
make -j"$JOBS" install
rm -rf "$OUT/lib/pkgconfig" "$OUT/lib/libffi.la" "$OUT/share"
