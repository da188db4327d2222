//! Who sent and received how much: counted per message and per datagram, not per packet, and put where others can read
//! it once a burst.

use std::collections::HashMap;
use std::net::Ipv4Addr;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Instant;

/// What passed between us and one peer.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Traffic {
    pub out_packets: u64,
    pub out_bytes: u64,
    pub in_packets: u64,
    pub in_bytes: u64,
    /// What was not sent to it, and what it sent that was refused.
    pub drops: u64,
    /// When a datagram of it was last accepted.
    pub heard: Option<Instant>,
}

impl Traffic {
    fn add(&mut self, other: &Self) {
        self.out_packets += other.out_packets;
        self.out_bytes += other.out_bytes;
        self.in_packets += other.in_packets;
        self.in_bytes += other.in_bytes;
        self.drops += other.drops;
        self.heard = self.heard.max(other.heard);
    }
}

/// Of one burst, in which there are few peers; the last one is asked for again as a rule.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub struct Burst {
    peers: Vec<(Ipv4Addr, Traffic)>,
    last: usize,
}

impl Burst {
    pub fn of(&mut self, peer: Ipv4Addr) -> &mut Traffic {
        if self.peers.get(self.last).is_none_or(|(other, _)| *other != peer) {
            let found = self.peers.iter().position(|(other, _)| *other == peer);
            self.last = found.unwrap_or_else(|| {
                self.peers.push((peer, Traffic::default()));
                self.peers.len() - 1
            });
        }
        &mut self.peers[self.last].1
    }
}

/// The totals. Only peers of the table are kept, so that strangers fill no memory.
#[derive(Debug, Default)]
pub struct Peers(Mutex<HashMap<Ipv4Addr, Traffic>>);

impl Peers {
    /// Adds what a burst saw and empties it.
    pub fn publish(&self, burst: &mut Burst, now: Instant) {
        if burst.peers.is_empty() {
            return;
        }
        let mut totals = self.lock();
        for (peer, traffic) in &mut burst.peers {
            if traffic.in_packets > 0 {
                traffic.heard = Some(now);
            }
            totals.entry(*peer).or_default().add(traffic);
        }
        burst.peers.clear();
    }

    /// Forgets those of whom `keep` says no.
    pub fn retain(&self, keep: impl Fn(Ipv4Addr) -> bool) {
        self.lock().retain(|peer, _| keep(*peer));
    }

    /// Those with any traffic, by address.
    pub fn read(&self) -> Vec<(Ipv4Addr, Traffic)> {
        let mut all: Vec<_> = self
            .lock()
            .iter()
            .map(|(peer, traffic)| (*peer, *traffic))
            .collect();
        all.sort_unstable_by_key(|(peer, _)| *peer);
        all
    }

    /// Numbers only ever grow in it, each by itself: whole even if a holder panicked.
    fn lock(&self) -> MutexGuard<'_, HashMap<Ipv4Addr, Traffic>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bursts_add_up_by_peer_and_who_left_is_forgotten() {
        let (one, two) = (Ipv4Addr::new(10, 0, 0, 1), Ipv4Addr::new(10, 0, 0, 2));
        let peers = Peers::default();
        let start = Instant::now();
        for _ in 0..3 {
            let mut burst = Burst::default();
            for peer in [one, two, one, two] {
                burst.of(peer).out_packets += 1;
            }
            burst.of(two).in_packets += 5;
            burst.of(one).drops += 1;
            peers.publish(&mut burst, start);
            assert_eq!(burst.peers, []);
        }
        let read = peers.read();
        assert_eq!(read.iter().map(|(peer, _)| *peer).collect::<Vec<_>>(), [one, two]);
        assert_eq!(
            (read[0].1.out_packets, read[0].1.drops, read[0].1.heard),
            (6, 3, None)
        );
        assert_eq!(
            (read[1].1.out_packets, read[1].1.in_packets, read[1].1.heard),
            (6, 15, Some(start))
        );
        peers.retain(|peer| peer == one);
        assert_eq!(peers.read().len(), 1);
    }
}
