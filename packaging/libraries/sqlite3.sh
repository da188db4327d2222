# SQLite by its amalgamation: one file, our options, no extension loading.
./configure --prefix=/usr/local --disable-shared --disable-tcl --disable-readline --disable-load-extension
make sqlite3.c sqlite3.h
"$CC" -O2 -fPIC -DSQLITE_THREADSAFE=1 -DSQLITE_OMIT_LOAD_EXTENSION -I. -c sqlite3.c -o sqlite3.o
"$AR" rcsD "$OUT/lib/libsqlite3.a" sqlite3.o
cp sqlite3.h sqlite3ext.h "$OUT/include/"
