//! The peers as the maps hold them, and writing the difference between two tables.

use std::collections::{BTreeMap, BTreeSet};
use std::net::Ipv4Addr;

use aya::Ebpf;
use aya::maps::lpm_trie::Key;
use aya::maps::{Array, LpmTrie, MapData, MapError, PerCpuHashMap, PerCpuValues};
use aya::util::nr_cpus;

use crate::layout::{Be32, FOREIGN, ForeignHop, Hop, Traffic};
use crate::{Error, NOBODY, error, mask, missing};

/// One route: a subnet and the host that has it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Peer {
    pub base: Ipv4Addr,
    pub length: u8,
    pub address: Ipv4Addr,
    /// It runs flanctl: its receiver completes what a network card was to do.
    pub direct: bool,
}

/// What `subnets`, `foreign` and `peers` hold.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Table {
    /// By subnet number; only those somebody has.
    subnets: BTreeMap<u32, (u32, u32)>,
    /// By prefix length and base address, in network order as the map's keys are.
    pub foreign: BTreeMap<(u32, u32), (u32, u32)>,
    /// Public IPs, in network order.
    peers: BTreeSet<u32>,
}

impl Table {
    /// Raises what the maps cannot hold.
    pub fn of(peers: &[Peer], network: (Ipv4Addr, u8), subnet_len: u8) -> Result<Self, Error> {
        let mut table = Self::default();
        let first = network.0.to_bits() & mask(network.1);
        for peer in peers {
            let (base, hop) = (peer.base.to_bits(), hop(*peer));
            if peer.length > 32 || base & !mask(peer.length) != 0 || peer.address.is_unspecified() {
                return Err(Error(format!(
                    "{}/{} is no subnet of a peer",
                    peer.base, peer.length
                )));
            }
            if peer.length == subnet_len && base & mask(network.1) == first {
                let number = (base - first).checked_shr(32 - u32::from(subnet_len));
                table.subnets.insert(number.unwrap_or(0), hop);
            } else {
                table.foreign.insert((peer.length.into(), base.to_be()), hop);
            }
            table.peers.insert(hop.0);
        }
        if table.foreign.len() > FOREIGN as usize {
            return Err(Error(format!(
                "{} leases have another length than the network's, {FOREIGN} at most are carried in the kernel",
                table.foreign.len()
            )));
        }
        Ok(table)
    }

    /// What an agent before us wrote.
    pub fn read(ebpf: &Ebpf) -> Result<Self, Error> {
        let map = |name: &str| ebpf.map(name).ok_or_else(|| missing(name));
        let read = |cause: MapError| error("cannot read the peers", &cause);
        let mut table = Self::default();
        let subnets: Array<_, Hop> = map("subnets")?.try_into().map_err(read)?;
        for (number, found) in (0..).zip(subnets.iter()) {
            let found = found.map_err(read)?;
            if found != NOBODY {
                table.subnets.insert(number, (found.address.0, found.direct));
            }
        }
        let foreign: LpmTrie<_, Be32, ForeignHop> = map("foreign")?.try_into().map_err(read)?;
        for found in &foreign {
            let (key, value) = found.map_err(read)?;
            let hop = (value.hop.address.0, value.hop.direct);
            table.foreign.insert((key.prefix_len(), key.data().0), hop);
        }
        let peers: PerCpuHashMap<_, Be32, Traffic> = map("peers")?.try_into().map_err(read)?;
        for found in peers.keys() {
            table.peers.insert(found.map_err(read)?.0);
        }
        Ok(table)
    }

    pub fn direct(&self) -> Vec<Ipv4Addr> {
        let hops = self.subnets.values().chain(self.foreign.values());
        let direct = hops.filter(|hop| hop.1 != 0);
        direct
            .map(|hop| Ipv4Addr::from_bits(u32::from_be(hop.0)))
            .collect()
    }

    /// Writes what `before` lacks or has otherwise. True if there was any.
    ///
    /// Senders first: a peer must be known before its packets come, and before ours make it answer.
    pub fn add_over(&self, before: &Self, ebpf: &mut Ebpf) -> Result<bool, Error> {
        let mut changed = false;
        let mut peers = peers(ebpf)?;
        for address in self.peers.difference(&before.peers) {
            peers.insert(Be32(*address), nothing_yet()?, 0).map_err(write)?;
            changed = true;
        }
        let mut foreign = foreign(ebpf)?;
        for (key, value) in differing(&self.foreign, &before.foreign) {
            let value = ForeignHop {
                hop: as_hop(*value),
                length: key.0,
                pad: 0,
            };
            foreign
                .insert(&Key::new(key.0, Be32(key.1)), value, 0)
                .map_err(write)?;
            changed = true;
        }
        let mut subnets = subnets(ebpf)?;
        for (number, value) in differing(&self.subnets, &before.subnets) {
            subnets.set(*number, as_hop(*value), 0).map_err(write)?;
            changed = true;
        }
        Ok(changed)
    }

    /// Takes out what `before` has too much. True if there was any.
    pub fn remove_from(&self, before: &Self, ebpf: &mut Ebpf) -> Result<bool, Error> {
        let mut changed = false;
        let mut subnets = subnets(ebpf)?;
        for number in before
            .subnets
            .keys()
            .filter(|number| !self.subnets.contains_key(number))
        {
            subnets.set(*number, NOBODY, 0).map_err(write)?;
            changed = true;
        }
        let mut foreign = foreign(ebpf)?;
        for key in before
            .foreign
            .keys()
            .filter(|key| !self.foreign.contains_key(key))
        {
            gone(foreign.remove(&Key::new(key.0, Be32(key.1))))?;
            changed = true;
        }
        let mut peers = peers(ebpf)?;
        for address in before.peers.difference(&self.peers) {
            gone(peers.remove(&Be32(*address)))?;
            changed = true;
        }
        Ok(changed)
    }
}

/// The counts of a new peer, one for each processor.
fn nothing_yet() -> Result<PerCpuValues<Traffic>, Error> {
    let processors = nr_cpus().map_err(|(file, cause)| error(file, &cause))?;
    PerCpuValues::try_from(vec![Traffic::default(); processors]).map_err(|cause| error("peers", &cause))
}

fn hop(peer: Peer) -> (u32, u32) {
    (Be32::from(peer.address).0, u32::from(peer.direct))
}

fn as_hop((address, direct): (u32, u32)) -> Hop {
    Hop {
        address: Be32(address),
        direct,
    }
}

fn differing<'a, K: Ord, V: PartialEq>(
    wanted: &'a BTreeMap<K, V>,
    before: &'a BTreeMap<K, V>,
) -> impl Iterator<Item = (&'a K, &'a V)> {
    wanted
        .iter()
        .filter(|(key, value)| before.get(*key) != Some(*value))
}

#[expect(clippy::needless_pass_by_value, reason = "as map_err calls it")]
fn write(cause: MapError) -> Error {
    error("cannot write the peers", &cause)
}

/// Not there any more is as good as removed.
fn gone(removed: Result<(), MapError>) -> Result<(), Error> {
    match removed {
        Ok(()) | Err(MapError::KeyNotFound) => Ok(()),
        Err(MapError::SyscallError(cause)) if cause.io_error.kind() == std::io::ErrorKind::NotFound => Ok(()),
        Err(cause) => Err(write(cause)),
    }
}

fn subnets(ebpf: &mut Ebpf) -> Result<Array<&mut MapData, Hop>, Error> {
    let map = ebpf.map_mut("subnets").ok_or_else(|| missing("subnets"))?;
    map.try_into().map_err(write)
}

fn foreign(ebpf: &mut Ebpf) -> Result<LpmTrie<&mut MapData, Be32, ForeignHop>, Error> {
    let map = ebpf.map_mut("foreign").ok_or_else(|| missing("foreign"))?;
    map.try_into().map_err(write)
}

fn peers(ebpf: &mut Ebpf) -> Result<PerCpuHashMap<&mut MapData, Be32, Traffic>, Error> {
    let map = ebpf.map_mut("peers").ok_or_else(|| missing("peers"))?;
    map.try_into().map_err(write)
}
