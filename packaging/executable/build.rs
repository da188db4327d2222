//! Takes what PyOxidizer generated (`FREEZE_ARTIFACTS`) and the packet path (`FREEZE_NATIVE`) into the executable.

use std::env;
use std::fs;
use std::path::PathBuf;

fn main() {
    for name in ["FREEZE_ARTIFACTS", "FREEZE_NATIVE"] {
        println!("cargo:rerun-if-env-changed={name}");
    }
    let given = |name: &str| {
        PathBuf::from(env::var_os(name).unwrap_or_else(|| panic!("{name} is not set: build with `make freeze`")))
    };
    let config = given("FREEZE_ARTIFACTS").join("default_python_config.rs");
    println!("cargo:rerun-if-changed={}", config.display());

    // The packed modules stand at the end of the file, not in its data: a change of Python alone needs no Rust.
    let text = fs::read_to_string(&config).expect("PyOxidizer's configuration");
    let (before, rest) = text.split_once("packed_resources: vec![").expect("it names the modules");
    let (_, after) = rest.split_once(")],\n").expect("it includes one file of modules");
    let target = PathBuf::from(env::var_os("OUT_DIR").expect("cargo sets it"));
    let own = format!("{before}packed_resources: vec![],\n{after}");
    fs::write(target.join("python_config.rs"), own).expect("OUT_DIR is writable");

    // One object with the single global symbol PyInit__native.
    let native = given("FREEZE_NATIVE");
    println!("cargo:rerun-if-changed={}", native.display());
    println!("cargo:rustc-link-arg-bins={}", native.display());
    // Libraries that are loaded later find libpython's symbols in the executable.
    println!("cargo:rustc-link-arg-bins=-Wl,-export-dynamic");
}
