//! The frozen flanctl: starts the CPython that is linked in, on the modules at the end of this very file.

mod arena;
mod crash;
mod parts;
mod waits;

use parts::Parts;
use pyembed::{ExtensionModule, MainPythonInterpreter, OxidizedPythonInterpreterConfig};
use pyo3::prelude::*;
use pyo3::types::PyDict;
use std::ffi::{c_char, c_void, CString};
use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::OnceLock;

// `default_python_config()`, as pyoxidizer.bzl describes it.
include!(concat!(env!("OUT_DIR"), "/python_config.rs"));

const MODULES: &str = "packed-resources";
static PARTS: OnceLock<Parts> = OnceLock::new();

/// Which of 0, 1 and 2 a parent had closed, a bit each. Rust's library opens /dev/null for these before `main`, so that no file
/// opened later gets a number that is meant for people; what is written to one is lost then, and `flanctl/frozen.py` has to know.
static CLOSED: AtomicU8 = AtomicU8::new(0);

extern "C" fn look_for_closed() {
    for descriptor in 0..=2 {
        // SAFETY: a plain system call on a number.
        if unsafe { libc::fcntl(descriptor, libc::F_GETFD) } == -1 {
            CLOSED.fetch_or(1 << descriptor, Ordering::Relaxed);
        }
    }
}

/// The dynamic loader calls what stands in this section before the program's entry.
#[used]
#[link_section = ".init_array"]
static BEFORE_RUST: extern "C" fn() = look_for_closed;

fn main() {
    crash::watch();
    std::process::exit(match run() {
        Ok(status) => status,
        Err(why) => {
            eprintln!("flanctl: {why}");
            1
        }
    });
}

fn run() -> Result<i32, String> {
    refuse_old_kernel()?;
    let parts = Parts::open().and_then(|parts| parts.map(MODULES).map(|bytes| (parts, bytes)));
    let (parts, modules) = match parts {
        Ok(found) => found,
        Err(why) => {
            crash::say_damaged(&why);
            return Ok(1);
        }
    };
    let _ = PARTS.set(parts);
    arena::install();
    name_frozen_modules();
    let mut config: OxidizedPythonInterpreterConfig = default_python_config();
    config.packed_resources.push(pyembed::PackedResourcesSource::Memory(modules));
    config.extra_extension_modules =
        Some(vec![builtin("flanctl._native", PyInit__native), builtin("_frozen", _frozen::init)]);
    // The interpreter is finalised (its buffers flushed) where it is dropped, so before the process's exit.
    match MainPythonInterpreter::new(config) {
        Ok(interpreter) => Ok(interpreter.run()),
        Err(error) => match parts::damage() {
            Some(why) => {
                crash::say_damaged(&why);
                Ok(1)
            }
            None => Err(format!("the Python interpreter does not start: {error}")),
        },
    }
}

/// glibc 2.17's systems begin at Linux 3.10; older kernels lack system calls that nothing here can do without.
fn refuse_old_kernel() -> Result<(), String> {
    // SAFETY: uname fills the structure it is given.
    let release = unsafe {
        let mut names: libc::utsname = std::mem::zeroed();
        libc::uname(&mut names);
        std::ffi::CStr::from_ptr(names.release.as_ptr()).to_string_lossy().into_owned()
    };
    let mut numbers = release.split(|c: char| !c.is_ascii_digit()).map(|text| text.parse().unwrap_or(0u32));
    let version = (numbers.next().unwrap_or(0), numbers.next().unwrap_or(0));
    if version < (3, 10) {
        return Err(format!("this kernel is Linux {release}; flanctl needs 3.10 or newer"));
    }
    Ok(())
}

/// An entry of CPython 3.11's tables of frozen modules; a null name ends a table.
#[repr(C)]
#[derive(Clone, Copy)]
struct FrozenModule {
    name: *const c_char,
    code: *const u8,
    size: i32,
    is_package: i32,
    get_code: *const c_void,
}

extern "C" {
    static mut PyImport_FrozenModules: *const FrozenModule;
    static _PyImport_FrozenBootstrap: *const FrozenModule;
    static _PyImport_FrozenStdlib: *const FrozenModule;
    fn PyInit__native() -> *mut pyo3::ffi::PyObject;
}

/// CPython 3.11 leaves `PyImport_FrozenModules` null (Python/frozen.c) and pyembed 0.24 reads it unchecked. Its importer finds
/// only what stands there, so the table gets the bootstrap modules and, being there, the deep-frozen ones as well.
fn name_frozen_modules() {
    let mut modules = Vec::new();
    // SAFETY: CPython's tables end with a null name; ours does too and lives for ever.
    unsafe {
        for table in [_PyImport_FrozenBootstrap, _PyImport_FrozenStdlib] {
            let mut entry = table;
            while !(*entry).name.is_null() {
                modules.push(*entry);
                entry = entry.add(1);
            }
        }
        modules.push(std::mem::zeroed());
        PyImport_FrozenModules = modules.leak().as_ptr();
    }
}

type Init = unsafe extern "C" fn() -> *mut pyo3::ffi::PyObject;

fn builtin(name: &str, init: Init) -> ExtensionModule {
    // SAFETY: pyembed names the same function type after its own copy of pyo3's PyObject.
    let init_func = unsafe { std::mem::transmute::<Init, _>(init) };
    ExtensionModule { name: CString::new(name).expect("no NUL in it"), init_func }
}

/// What `flanctl/frozen.py` asks of the program it is frozen into.
#[pymodule]
fn _frozen(py: Python<'_>, module: &PyModule) -> PyResult<()> {
    let parts = PyDict::new(py);
    for part in PARTS.get().iter().flat_map(|parts| &parts.list) {
        parts.set_item(&part.name, (part.offset, part.length))?;
    }
    module.add("parts", parts)?;
    let closed = CLOSED.load(Ordering::Relaxed);
    let names = ["stdin", "stdout", "stderr"].into_iter().enumerate();
    let names: Vec<_> = names.filter(|(number, _)| closed >> number & 1 == 1).map(|(_, name)| name).collect();
    module.add("closed", names)?;
    module.add_function(wrap_pyfunction!(damage, module)?)?;
    module.add_function(wrap_pyfunction!(unhandled, module)?)?;
    module.add_function(wrap_pyfunction!(memfd_create, module)?)
}

/// What is wrong with the program's file, or None.
#[pyfunction]
fn damage() -> Option<String> {
    parts::damage().map(Into::into)
}

/// `sys.excepthook`, from before the first import on: the last resort below what `flanctl/cli.py` catches.
#[pyfunction]
fn unhandled(kind: &PyAny, error: &PyAny, _trace: &PyAny) -> PyResult<()> {
    if error.is_instance_of::<pyo3::exceptions::PyKeyboardInterrupt>()? {
        eprintln!("interrupted");
        return Ok(());
    }
    match parts::damage() {
        Some(why) => crash::say_damaged(&why),
        None => eprintln!("flanctl: unexpected {}: {}\ntry: report this", kind.getattr("__name__")?, error.str()?),
    }
    Ok(())
}

/// memfd_create(2) by number: glibc has no function for it before 2.27, nor has `os` in a Python built for such a glibc.
#[pyfunction]
fn memfd_create(name: &str, flags: u32) -> PyResult<i32> {
    let name = CString::new(name)?;
    // SAFETY: the name is a C string that outlives the call.
    let descriptor = unsafe { libc::syscall(libc::SYS_memfd_create, name.as_ptr(), flags) };
    if descriptor < 0 {
        return Err(std::io::Error::last_os_error().into());
    }
    Ok(descriptor as i32)
}
