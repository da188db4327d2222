//! Where Python's small objects live: arenas that are mapped whole, at once.
//!
//! CPython maps an arena of 1 MiB at a time and touches all of it soon. One page fault for each 4 KiB of it was a tenth of a
//! short command's time; the kernel fills the pages of one mapping far faster by itself.

use std::ffi::c_void;

/// PyObjectArenaAllocator (Include/cpython/objimpl.h).
#[repr(C)]
struct ArenaAllocator {
    context: *mut c_void,
    alloc: extern "C" fn(*mut c_void, usize) -> *mut c_void,
    free: extern "C" fn(*mut c_void, *mut c_void, usize),
}

extern "C" {
    fn PyObject_SetArenaAllocator(allocator: *mut ArenaAllocator);
}

extern "C" fn alloc(_: *mut c_void, size: usize) -> *mut c_void {
    // SAFETY: a new anonymous mapping.
    let start = unsafe {
        libc::mmap(
            std::ptr::null_mut(),
            size,
            libc::PROT_READ | libc::PROT_WRITE,
            libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_POPULATE,
            -1,
            0,
        )
    };
    if start == libc::MAP_FAILED {
        std::ptr::null_mut()
    } else {
        start
    }
}

extern "C" fn free(_: *mut c_void, start: *mut c_void, size: usize) {
    // SAFETY: CPython gives back what `alloc` gave it.
    unsafe { libc::munmap(start, size) };
}

/// glibc's malloc gives each new thread an arena of its own, eight for each core; an agent's threads are many and need
/// little, and what one frees another does not get.
const MALLOC_ARENAS: libc::c_int = 2;

/// To be called before the interpreter is initialised.
pub fn install() {
    // SAFETY: a setting, made before there is a second thread.
    unsafe { libc::mallopt(libc::M_ARENA_MAX, MALLOC_ARENAS) };
    let mut allocator = ArenaAllocator { context: std::ptr::null_mut(), alloc, free };
    // SAFETY: CPython copies the structure.
    unsafe { PyObject_SetArenaAllocator(&mut allocator) };
}
