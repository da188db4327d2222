//! A crash of a file that was altered is told as such: no core dump of somebody's broken copy.
//!
//! Checking 50 MB at each start would cost more than the start. So it is done when something has gone wrong that must not.

use std::ffi::OsStr;
use std::io::Write;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

const SIGNALS: [libc::c_int; 6] =
    [libc::SIGSEGV, libc::SIGBUS, libc::SIGILL, libc::SIGFPE, libc::SIGTRAP, libc::SIGABRT];
const STACK: usize = 128 << 10;
/// Seconds for the look at the file. A crash within malloc holds its lock: should anything below wait for it after all, the
/// process ends all the same.
const PATIENCE: u32 = 30;

/// From now on a crash looks at the file first.
pub fn watch() {
    // SAFETY: plain system calls on zeroed structures; the stack lives for ever.
    unsafe {
        let stack: libc::stack_t = libc::stack_t {
            ss_sp: Box::leak(vec![0u8; STACK].into_boxed_slice()).as_mut_ptr().cast(),
            ss_flags: 0,
            ss_size: STACK,
        };
        libc::sigaltstack(&stack, std::ptr::null_mut());
        let mut action: libc::sigaction = std::mem::zeroed();
        action.sa_sigaction = on_crash as *const () as usize;
        // Once: a second crash, in here or after, is the system's.
        action.sa_flags = libc::SA_ONSTACK | libc::SA_RESETHAND | libc::SA_NODEFER;
        for signal in SIGNALS {
            libc::sigaction(signal, &action, std::ptr::null_mut());
        }
    }
}

extern "C" fn on_crash(signal: libc::c_int) {
    // SAFETY: both are async-signal-safe.
    unsafe {
        libc::signal(libc::SIGALRM, libc::SIG_DFL);
        libc::alarm(PATIENCE);
    }
    if let Some(why) = crate::parts::damage() {
        say_damaged(&why);
        // SAFETY: ends the process at once, whatever state it is in.
        unsafe { libc::_exit(1) };
    }
    // The handler is gone (SA_RESETHAND): this one ends the process as if there had been none.
    // SAFETY: raise is async-signal-safe.
    unsafe { libc::raise(signal) };
}

/// The one line. Allocates nothing.
pub fn say_damaged(why: &str) {
    let mut name = [0u8; libc::PATH_MAX as usize];
    // SAFETY: readlink writes at most as many bytes as it is told there are.
    let length = unsafe { libc::readlink(c"/proc/self/exe".as_ptr(), name.as_mut_ptr().cast(), name.len()) };
    let path = Path::new(OsStr::from_bytes(&name[..usize::try_from(length).unwrap_or(0)]));
    let _ = writeln!(
        std::io::stderr(),
        "flanctl: the file {} is damaged: {why}\ntry: copy it again and compare it with flanctl.sha256",
        path.display()
    );
}
