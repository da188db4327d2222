//! Compiles the TC programs with clang; the loader embeds the object.

use std::env;
use std::path::PathBuf;
use std::process::Command;

/// Nothing in the object may tell where it was built: it goes into the frozen file.
const FLAGS: [&str; 9] = [
    "-O2",
    "-g", // BTF, from which the loader learns the maps
    "-target",
    "bpf",
    "-mcpu=v3", // 32-bit jumps: Linux 5.1
    "-Wall",
    "-Wextra",
    "-Werror",
    "-ffile-compilation-dir=.",
];

fn main() {
    for file in ["src/flannel.bpf.c", "src/flannel.h"] {
        println!("cargo:rerun-if-changed={file}");
    }
    println!("cargo:rerun-if-env-changed=FLANCTL_CLANG");
    let object = PathBuf::from(env::var_os("OUT_DIR").expect("cargo sets OUT_DIR")).join("flannel.bpf.o");
    let clang = env::var("FLANCTL_CLANG").unwrap_or_else(|_| "clang".to_owned());
    // Debian keeps asm/types.h where the machine's own compiler looks for it, and -target bpf does not.
    let machine = env::var("CARGO_CFG_TARGET_ARCH").unwrap_or_default();
    let done = Command::new(&clang)
        .args(FLAGS)
        .arg(format!("-I/usr/include/{machine}-linux-gnu"))
        .args(["-c", "src/flannel.bpf.c", "-o"])
        .arg(&object)
        .status();
    match done {
        Ok(status) if status.success() => {}
        Ok(status) => panic!(
            "{clang} could not compile native/bpf/src/flannel.bpf.c ({status}): are libbpf-dev and linux-libc-dev installed?"
        ),
        Err(error) => panic!("{clang} cannot be run ({error}): apt-get install clang libbpf-dev"),
    }
}
