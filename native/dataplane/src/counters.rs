//! What happened to packets, by reason. The worker adds up locally and publishes once per burst.

use std::sync::atomic::{AtomicU64, Ordering};

use crate::traffic::Burst;

macro_rules! reasons {
    ($($(#[$doc:meta])* $variant:ident => $name:literal,)*) => {
        /// Why a packet went no further.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
        pub enum Reason { $($(#[$doc])* $variant,)* }

        impl Reason {
            /// Every reason, in the order of the counters.
            pub const ALL: &'static [Reason] = &[$(Reason::$variant,)*];

            /// The counter's name, as operators and tests read it.
            pub fn name(self) -> &'static str {
                match self { $(Reason::$variant => $name,)* }
            }
        }
    };
}

reasons! {
    /// From the TUN: no peer has the destination, or it is multicast, broadcast or our own subnet.
    NoRoute => "no_route",
    /// Fewer than the 20 bytes of an IPv4 header.
    Short => "short",
    /// Not IPv4.
    BadVersion => "bad_version",
    /// Header or total length disagree with what arrived (RFC 791), trailing bytes included.
    BadLength => "bad_length",
    /// The datagram came from an address that is no peer's public IP.
    UnknownSender => "unknown_sender",
    /// A peer sent it, but its inner source is not that peer's to use.
    SpoofedSource => "spoofed_source",
    /// The inner destination is not ours, or is multicast or broadcast.
    ForeignDestination => "foreign_destination",
    /// Larger than the TUN's MTU, or than the underlay would take.
    TooBig => "too_big",
    /// The underlay refused it: network unreachable, firewall, …
    SendError => "send_error",
    /// The TUN refused it, for instance because the device is down.
    TunError => "tun_error",
    /// A send or TUN queue stayed full.
    QueueFull => "queue_full",
}

const REASONS: usize = Reason::ALL.len();

/// Counts of one worker since it last published. Plain numbers: no atomics in the packet loop.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub struct Tally {
    pub out_packets: u64,
    pub out_bytes: u64,
    pub in_packets: u64,
    pub in_bytes: u64,
    pub icmp_sent: u64,
    /// The same by peer.
    pub peers: Burst,
    drops: [u64; REASONS],
}

impl Tally {
    pub fn drop(&mut self, reason: Reason) {
        self.drop_many(reason, 1);
    }

    pub fn drop_many(&mut self, reason: Reason, packets: u64) {
        self.drops[reason as usize] += packets;
    }

    pub fn drops(&self, reason: Reason) -> u64 {
        self.drops[reason as usize]
    }

    fn values(&self) -> impl Iterator<Item = u64> {
        [
            self.out_packets,
            self.out_bytes,
            self.in_packets,
            self.in_bytes,
            self.icmp_sent,
        ]
        .into_iter()
        .chain(self.drops)
    }
}

const NAMES: [&str; 5] = ["out_packets", "out_bytes", "in_packets", "in_bytes", "icmp_sent"];

/// The published totals since start. Readable from any thread; each number is exact, the set is not one instant.
#[derive(Debug, Default)]
pub struct Counters([AtomicU64; NAMES.len() + REASONS]);

impl Counters {
    /// Adds `tally` and empties it, but for what it says of peers.
    pub fn publish(&self, tally: &mut Tally) {
        for (total, value) in self.0.iter().zip(tally.values()) {
            if value != 0 {
                total.fetch_add(value, Ordering::Relaxed);
            }
        }
        let peers = std::mem::take(&mut tally.peers);
        *tally = Tally {
            peers,
            ..Tally::default()
        };
    }

    /// Names and values: traffic first, then `drop_<reason>` for every reason.
    pub fn read(&self) -> impl Iterator<Item = (String, u64)> {
        let drops = Reason::ALL.iter().map(|reason| format!("drop_{}", reason.name()));
        let names = NAMES.iter().map(ToString::to_string).chain(drops);
        names.zip(self.0.iter().map(|total| total.load(Ordering::Relaxed)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_reason_is_its_own_counter_and_publishing_empties_the_tally() {
        let counters = Counters::default();
        for (n, reason) in Reason::ALL.iter().enumerate() {
            let mut tally = Tally::default();
            tally.drop_many(*reason, n as u64 + 1);
            counters.publish(&mut tally);
            assert_eq!(tally, Tally::default());
        }
        let read: Vec<_> = counters.read().collect();
        for (n, reason) in Reason::ALL.iter().enumerate() {
            assert!(read.contains(&(format!("drop_{}", reason.name()), n as u64 + 1)));
        }
        assert_eq!(read.len(), 16);
    }
}
