//! What the kernel does for us in bulk: probed once, given up on the fly, and shown with its reason.
//!
//! | name | what | without it |
//! | --- | --- | --- |
//! | `tso` | the TUN hands over and takes TCP super-packets (2.6.27, virtio headers) | packets one by one |
//! | `uso` | the same for UDP (Linux 6.2) | one by one |
//! | `gso` | the socket takes several datagrams as one message, `UDP_SEGMENT` (4.18) | one message each |
//! | `gro` | the socket hands over several datagrams as one, `UDP_GRO` (5.0) | one by one |
//!
//! Without any of them it is the plain loop: what a 3.10 kernel can run.

use std::fmt;
use std::io;
use std::str::FromStr;
use std::sync::{Mutex, PoisonError};

use crate::coalesce::Kinds;

/// One of them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Offload {
    Tso,
    Uso,
    Gso,
    Gro,
}

impl Offload {
    pub const ALL: [Self; 4] = [Self::Tso, Self::Uso, Self::Gso, Self::Gro];

    pub fn name(self) -> &'static str {
        match self {
            Self::Tso => "tso",
            Self::Uso => "uso",
            Self::Gso => "gso",
            Self::Gro => "gro",
        }
    }
}

/// Those that may be used.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Allowed([bool; 4]);

impl Allowed {
    pub const ALL: Self = Self([true; 4]);
    pub const NONE: Self = Self([false; 4]);

    pub fn has(self, offload: Offload) -> bool {
        self.0[offload as usize]
    }
}

/// `all`, `none`, or names with commas.
impl FromStr for Allowed {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "all" => return Ok(Self::ALL),
            "none" => return Ok(Self::NONE),
            _ => {}
        }
        let mut allowed = Self::NONE;
        for word in text.split(',') {
            let found = Offload::ALL.into_iter().find(|offload| offload.name() == word);
            let offload =
                found.ok_or_else(|| format!("offload {word:?} is none of all, none, tso, uso, gso, gro"))?;
            allowed.0[offload as usize] = true;
        }
        Ok(allowed)
    }
}

/// How things stand with one of them.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Level {
    pub on: bool,
    /// Why it is off.
    pub why: String,
}

/// All of them. The worker writes when something changes, which is rare; anybody reads.
#[derive(Debug, Default)]
pub struct Levels(Mutex<[Level; 4]>);

impl Levels {
    fn on(&self, offload: Offload) {
        self.put(
            offload,
            Level {
                on: true,
                why: String::new(),
            },
        );
    }

    /// From now on it is not used. The first reason stays.
    pub fn off(&self, offload: Offload, why: impl fmt::Display) {
        if self.get(offload).on || self.get(offload).why.is_empty() {
            self.put(
                offload,
                Level {
                    on: false,
                    why: why.to_string(),
                },
            );
        }
    }

    fn put(&self, offload: Offload, level: Level) {
        // A level is replaced whole, so that it is whole even if a holder panicked.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)[offload as usize] = level;
    }

    pub fn get(&self, offload: Offload) -> Level {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)[offload as usize].clone()
    }
}

/// What is asked of the kernel; the real one is in [`crate::sys`], tests have one that knows less.
pub trait System {
    /// Tells the TUN what we take unfinished. EINVAL: it does not know all of it.
    fn offload_tun(&self, kinds: Kinds) -> io::Result<()>;

    /// Sets `UDP_SEGMENT` to "only where a message asks for it".
    fn segment(&self) -> io::Result<()>;

    /// Sets `UDP_GRO`.
    fn merge(&self, on: bool) -> io::Result<()>;

    /// Of the kernel.
    fn version(&self) -> (u32, u32);
}

/// What a probe found.
#[derive(Debug)]
pub struct Found {
    /// The super-packets the TUN hands over and takes.
    pub kinds: Kinds,
    /// How many packets one message may hold.
    pub segments: usize,
    pub levels: Levels,
}

const TOLD: &str = "it was told so (--offloads, --data-path)";

/// Asks for everything allowed, and settles for less. `headers`: the TUN has virtio headers.
///
/// An error means that a TUN keeps what an earlier process asked of it: its packets could not be understood.
pub fn probe(system: &impl System, headers: bool, allowed: Allowed) -> io::Result<Found> {
    let levels = Levels::default();
    let kinds = probe_tun(system, headers, allowed, &levels)?;
    let mut segments = 1;
    if !allowed.has(Offload::Gso) {
        levels.off(Offload::Gso, TOLD);
    } else if let Err(error) = system.segment() {
        levels.off(Offload::Gso, format!("UDP_SEGMENT (Linux 4.18): {error}"));
    } else {
        levels.on(Offload::Gso);
        // UDP_MAX_SEGMENTS is 64, and 128 since Linux 6.9. Kernels before count their own header against the product
        // of size and limit, so one less is always safe.
        segments = if system.version() >= (6, 9) { 127 } else { 63 };
    }
    if !allowed.has(Offload::Gro) {
        levels.off(Offload::Gro, TOLD);
        // It may be on from an earlier data plane on this socket. One that does not know it has it off.
        let _ = system.merge(false);
    } else if let Err(error) = system.merge(true) {
        levels.off(Offload::Gro, format!("UDP_GRO (Linux 5.0): {error}"));
    } else {
        levels.on(Offload::Gro);
    }
    Ok(Found {
        kinds,
        segments,
        levels,
    })
}

fn probe_tun(system: &impl System, headers: bool, allowed: Allowed, levels: &Levels) -> io::Result<Kinds> {
    let wanted = Kinds {
        tcp: headers && allowed.has(Offload::Tso),
        udp: headers && allowed.has(Offload::Uso),
    };
    for (offload, on) in [(Offload::Tso, wanted.tcp), (Offload::Uso, wanted.udp)] {
        match (on, allowed.has(offload)) {
            (true, _) => levels.on(offload),
            (false, true) => levels.off(offload, "this TUN has no virtio headers"),
            (false, false) => levels.off(offload, TOLD),
        }
    }
    if wanted.udp {
        match system.offload_tun(wanted) {
            Ok(()) => return Ok(wanted),
            Err(error) => levels.off(
                Offload::Uso,
                format!("UDP super-packets of a TUN (Linux 6.2): {error}"),
            ),
        }
    }
    if wanted.tcp {
        let tcp = Kinds {
            tcp: true,
            udp: false,
        };
        match system.offload_tun(tcp) {
            Ok(()) => return Ok(tcp),
            Err(error) => levels.off(Offload::Tso, format!("TCP super-packets of a TUN: {error}")),
        }
    }
    // A persistent device remembers what an earlier agent could do with its packets. One with headers may keep it:
    // the headers say what is to be done.
    match system.offload_tun(Kinds::NONE) {
        Err(error) if !headers => Err(error),
        _ => Ok(Kinds::NONE),
    }
}

#[cfg(test)]
mod tests {
    use std::cell::RefCell;

    use rustix::io::Errno;

    use super::*;

    /// A kernel of some age.
    struct Kernel {
        knows: &'static [Offload],
        version: (u32, u32),
        asked: RefCell<Vec<Kinds>>,
    }

    use Offload::{Gro, Gso, Tso, Uso};

    fn kernel(version: (u32, u32), knows: &'static [Offload]) -> Kernel {
        Kernel {
            knows,
            version,
            asked: RefCell::default(),
        }
    }

    fn newest() -> Kernel {
        kernel((6, 18), &Offload::ALL)
    }

    impl Kernel {
        fn answer(&self, wants: Offload, errno: Errno) -> io::Result<()> {
            if self.knows.contains(&wants) {
                Ok(())
            } else {
                Err(errno.into())
            }
        }
    }

    impl System for Kernel {
        fn offload_tun(&self, kinds: Kinds) -> io::Result<()> {
            self.asked.borrow_mut().push(kinds);
            if kinds.tcp {
                self.answer(Tso, Errno::INVAL)?;
            }
            if kinds.udp {
                self.answer(Uso, Errno::INVAL)?;
            }
            Ok(())
        }

        fn segment(&self) -> io::Result<()> {
            self.answer(Gso, Errno::NOPROTOOPT)
        }

        fn merge(&self, on: bool) -> io::Result<()> {
            if on {
                self.answer(Gro, Errno::NOPROTOOPT)
            } else {
                Ok(())
            }
        }

        fn version(&self) -> (u32, u32) {
            self.version
        }
    }

    fn names(found: &Found) -> Vec<&'static str> {
        let on = Offload::ALL
            .into_iter()
            .filter(|offload| found.levels.get(*offload).on);
        on.map(Offload::name).collect()
    }

    #[test]
    fn every_age_of_kernel_gets_what_it_knows_and_says_what_it_lacks() {
        for (version, knows, segments) in [
            ((6, 18), &Offload::ALL[..], 127),
            ((6, 8), &[Tso, Uso, Gso, Gro], 63),
            ((5, 10), &[Tso, Gso, Gro], 63),
            ((4, 18), &[Tso, Gso], 63),
            ((3, 10), &[Tso], 1),
            ((2, 6), &[], 1),
        ] {
            let kernel = kernel(version, knows);
            let found = probe(&kernel, true, Allowed::ALL).unwrap();
            let on: Vec<&str> = knows.iter().map(|offload| offload.name()).collect();
            assert_eq!((names(&found), found.segments), (on, segments));
            assert_eq!(
                (found.kinds.tcp, found.kinds.udp),
                (
                    found.levels.get(Offload::Tso).on,
                    found.levels.get(Offload::Uso).on
                )
            );
            for offload in Offload::ALL {
                let level = found.levels.get(offload);
                assert_eq!(level.on, level.why.is_empty(), "{}: {level:?}", offload.name());
            }
            assert_eq!(
                *kernel.asked.borrow().last().unwrap(),
                found.kinds,
                "what was asked last is what stands"
            );
        }
    }

    #[test]
    fn what_is_not_allowed_is_not_asked_for() {
        for text in ["none", "tso", "uso", "gso", "gro", "tso,gro", "uso,gso"] {
            let found = probe(&newest(), true, text.parse().unwrap()).unwrap();
            let wanted: Vec<&str> = text.split(',').filter(|word| *word != "none").collect();
            assert_eq!(names(&found), wanted);
            assert_eq!(found.segments > 1, text.contains("gso"));
        }
    }

    #[test]
    fn a_tun_without_headers_has_no_super_packets_whatever_is_allowed() {
        let kernel = newest();
        let found = probe(&kernel, false, Allowed::ALL).unwrap();
        assert_eq!(names(&found), ["gso", "gro"]);
        assert_eq!(*kernel.asked.borrow(), [Kinds::NONE]);
        assert!(found.levels.get(Offload::Tso).why.contains("virtio headers"));
    }

    #[test]
    fn the_first_reason_stays() {
        let levels = Levels::default();
        levels.on(Offload::Gso);
        levels.off(Offload::Gso, "first");
        levels.off(Offload::Gso, "second");
        assert_eq!(levels.get(Offload::Gso).why, "first");
    }

    #[test]
    fn nonsense_is_named() {
        assert!("tso,lro".parse::<Allowed>().unwrap_err().contains("\"lro\""));
        assert!("".parse::<Allowed>().is_err());
    }
}
