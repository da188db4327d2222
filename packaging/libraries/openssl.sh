# OpenSSL without what flanctl never loads. --openssldir is where certificate authorities are sought at run time: /etc/ssl is
# right on Debian, Ubuntu, SUSE and Arch; flanctl itself knows where Red Hat's are.
./Configure linux-x86_64 --prefix=/usr/local --libdir=lib --openssldir=/etc/ssl \
    no-shared no-tests no-engine no-dso no-legacy no-async no-comp no-ssl3 no-weak-ssl-ciphers -O2 -fPIC
make -j"$JOBS" build_generated
make -j"$JOBS" libcrypto.a libssl.a
cp libcrypto.a libssl.a "$OUT/lib/"
cp -r include/openssl "$OUT/include/"
