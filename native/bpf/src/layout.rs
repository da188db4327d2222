//! The maps' contents, byte for byte as `flannel.h` has them.

use std::net::Ipv4Addr;
use std::time::Duration;

/// Changes whenever the meaning of a map's bytes does.
pub const LAYOUT: u32 = 3;
pub const UPLINKS: usize = 8;
pub const FOREIGN: u32 = 4096;

#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Config {
    /// `CLOCK_BOOTTIME`, nanoseconds: after it everything goes to user space.
    pub valid_until: u64,
    pub layout: u32,
    /// Interface index.
    pub tun: u32,
    pub local: Be32,
    pub port: Be16,
    /// The TUN's.
    pub mtu: u16,
    pub peer_check: u32,
    pub network: u32,
    pub network_mask: u32,
    pub own: u32,
    pub own_mask: u32,
    pub subnet_len: u32,
    pub foreign: u32,
    /// Interface indexes; unused ones are 0.
    pub uplinks: [u32; UPLINKS],
    pub rx_port: Be16,
    pub rx_mark: u16,
    pub rx_vni: u32,
}

/// In network order.
#[repr(transparent)]
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Hash)]
pub struct Be32(pub u32);

impl From<Ipv4Addr> for Be32 {
    fn from(address: Ipv4Addr) -> Self {
        Self(address.to_bits().to_be())
    }
}

/// In network order.
#[repr(transparent)]
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Be16(u16);

impl From<u16> for Be16 {
    fn from(number: u16) -> Self {
        Self(number.to_be())
    }
}

#[repr(C, align(8))]
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Hop {
    /// 0: nobody.
    pub address: Be32,
    pub direct: u32,
}

#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct ForeignHop {
    pub hop: Hop,
    pub length: u32,
    pub pad: u32,
}

#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Count {
    pub packets: u64,
    pub bytes: u64,
}

/// What passed between us and one peer.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Traffic {
    pub out_packets: u64,
    pub out_bytes: u64,
    pub in_packets: u64,
    pub in_bytes: u64,
    pub drops: u64,
    /// `CLOCK_BOOTTIME`, nanoseconds; 0: never.
    pub heard: u64,
}

impl Traffic {
    /// Time since a packet of the peer was last accepted.
    pub fn heard_ago(&self) -> Option<Duration> {
        let mut now = libc::timespec {
            tv_sec: 0,
            tv_nsec: 0,
        };
        // SAFETY: it writes one struct of ours. This clock is there since Linux 2.6.39.
        unsafe { libc::clock_gettime(libc::CLOCK_BOOTTIME, &raw mut now) };
        let now = now.tv_sec.cast_unsigned() * 1_000_000_000 + now.tv_nsec.cast_unsigned();
        (self.heard != 0).then(|| Duration::from_nanos(now.saturating_sub(self.heard)))
    }
}

macro_rules! pod {
    ($($name:ty),*) => {
        $(
            // SAFETY: plain integers without padding bytes (a field `pad` is what would be some), valid for any content,
            // and laid out as the C struct of flannel.h.
            unsafe impl aya::Pod for $name {}
        )*
    };
}
pod!(Config, Be32, Hop, ForeignHop, Count, Traffic);

/// `enum event` of flannel.h: the names of the counters, in order.
pub const SENT: u32 = 0;
pub const RECEIVED: u32 = 1;
pub const STACK_GIVEN: u32 = 2;
pub const STACK_RETURNED: u32 = 3;
pub const FIRST_DROP: u32 = 4;
pub const DROPS: [&str; 8] = [
    "short",
    "bad_version",
    "bad_length",
    "unknown_sender",
    "spoofed_source",
    "foreign_destination",
    "send_error",
    "tun_error",
];
pub const PASSES: [&str; 6] = [
    "no_route",
    "not_flanctl",
    "too_big",
    "no_uplink",
    "expired",
    "other",
];
pub const EVENTS: u32 = FIRST_DROP + DROPS.len() as u32 + PASSES.len() as u32;

/// What a map must be like to be ours: name, bytes of key and value, and its size where the loader does not choose it.
pub const MAPS: [(&str, usize, usize); 6] = [
    ("config", 4, size_of::<Config>()),
    ("subnets", 4, size_of::<Hop>()),
    ("foreign", 8, size_of::<ForeignHop>()),
    ("peers", 4, size_of::<Traffic>()),
    ("counters", 4, size_of::<Count>()),
    ("device", 4, 8), // struct bpf_devmap_val
];
