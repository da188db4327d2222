//! Who carries which subnet: an immutable table, replaced whole.
//!
//! All leases of a flannel network have one prefix length, so that length gets a direct index (one load, about
//! 3 ns however many routes; flanneld's list takes 3.7 µs at 10,000). Leases of other lengths are legal if foreign,
//! and are found by one binary search per length. The longest prefix wins, whatever the order of arrival.

use std::fmt;
use std::net::Ipv4Addr;
use std::str::FromStr;

/// An IPv4 subnet without host bits.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Subnet {
    base: u32,
    prefix_len: u8,
}

impl Subnet {
    /// The subnet of `prefix_len` bits that holds `address`; None if `prefix_len` is over 32.
    pub fn holding(address: Ipv4Addr, prefix_len: u8) -> Option<Self> {
        (prefix_len <= 32).then(|| Self {
            base: address.to_bits() & mask(prefix_len),
            prefix_len,
        })
    }

    pub fn base(self) -> Ipv4Addr {
        Ipv4Addr::from_bits(self.base)
    }

    pub fn prefix_len(self) -> u8 {
        self.prefix_len
    }

    pub fn contains(self, address: Ipv4Addr) -> bool {
        address.to_bits() & mask(self.prefix_len) == self.base
    }

    /// All host bits set. Subnets of one or two addresses have none (RFC 3021).
    pub fn is_broadcast(self, address: Ipv4Addr) -> bool {
        self.prefix_len < 31 && address.to_bits() == self.base | !mask(self.prefix_len)
    }
}

impl fmt::Display for Subnet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.base(), self.prefix_len)
    }
}

fn mask(prefix_len: u8) -> u32 {
    u32::MAX.checked_shl(32 - u32::from(prefix_len)).unwrap_or(0)
}

/// One line of the table: packets for `subnet` go to `peer`, and only `peer` may send packets from there.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Route {
    subnet: Subnet,
    peer: Ipv4Addr,
}

impl Route {
    /// `base` must have no bits beyond `prefix_len`, and `peer` must be an address a datagram can be sent to.
    pub fn new(base: Ipv4Addr, prefix_len: u8, peer: Ipv4Addr) -> Result<Self, String> {
        let subnet = Subnet::holding(base, prefix_len)
            .ok_or_else(|| format!("{base}/{prefix_len}: the prefix length is over 32"))?;
        if subnet.base() != base {
            return Err(format!(
                "{base}/{prefix_len}: host bits are set, {subnet} is meant"
            ));
        }
        if peer.is_unspecified() || peer.is_broadcast() || peer.is_multicast() {
            return Err(format!("{subnet}: the public IP {peer} is not a host's"));
        }
        Ok(Self { subnet, peer })
    }

    pub fn subnet(self) -> Subnet {
        self.subnet
    }

    pub fn peer(self) -> Ipv4Addr {
        self.peer
    }
}

/// Widest direct index, in subnets: 4 MiB. A flannel network has at most 2^22 subnets, 256 as a rule.
const DIRECT_SLOTS: u32 = 1 << 20;

/// Routes of one prefix length. Peers are bits; 0 is nobody, which `Route` keeps out.
#[derive(Debug)]
struct Level {
    prefix_len: u8,
    index: Index,
}

#[derive(Debug)]
enum Index {
    /// By subnet number, counted from `first`.
    Direct { first: u32, peers: Box<[u32]> },
    /// Sorted by base address.
    Sorted(Box<[(u32, u32)]>),
}

impl Level {
    fn find(&self, address: u32) -> Option<u32> {
        let base = address & mask(self.prefix_len);
        match &self.index {
            Index::Direct { first, peers } => {
                let slot = number(base, self.prefix_len).wrapping_sub(*first);
                peers.get(slot as usize).copied().filter(|peer| *peer != 0)
            }
            Index::Sorted(entries) => entries
                .binary_search_by_key(&base, |entry| entry.0)
                .ok()
                .map(|at| entries[at].1),
        }
    }
}

/// How many subnets of this length lie below `base`.
fn number(base: u32, prefix_len: u8) -> u32 {
    base.checked_shr(32 - u32::from(prefix_len)).unwrap_or(0)
}

/// The table. Compare two for equality to learn whether anything changed.
#[derive(Debug, Default)]
pub struct Routes {
    listed: Box<[Route]>,
    /// Longest prefix first.
    levels: Box<[Level]>,
    /// Sorted, each once.
    peers: Box<[u32]>,
}

impl PartialEq for Routes {
    fn eq(&self, other: &Self) -> bool {
        self.listed == other.listed
    }
}

impl Eq for Routes {}

impl Routes {
    /// Builds the table, or names the subnet that is listed twice.
    pub fn new(routes: impl IntoIterator<Item = Route>) -> Result<Self, String> {
        let mut listed: Vec<Route> = routes.into_iter().collect();
        listed.sort_unstable_by_key(|route| (std::cmp::Reverse(route.subnet.prefix_len), route.subnet.base));
        if let Some(pair) = listed.windows(2).find(|pair| pair[0].subnet == pair[1].subnet) {
            return Err(format!("{}: listed twice", pair[0].subnet));
        }
        let groups: Vec<&[Route]> = listed
            .chunk_by(|a, b| a.subnet.prefix_len == b.subnet.prefix_len)
            .collect();
        let most = groups.iter().map(|group| group.len()).max();
        let levels = groups
            .iter()
            .map(|group| Self::level(group, Some(group.len()) == most))
            .collect();

        let mut peers: Vec<u32> = listed.iter().map(|route| route.peer.to_bits()).collect();
        peers.sort_unstable();
        peers.dedup();
        Ok(Self {
            levels,
            peers: peers.into(),
            listed: listed.into(),
        })
    }

    /// `group` is not empty, sorted by base, of one length.
    fn level(group: &[Route], most_common: bool) -> Level {
        let prefix_len = group[0].subnet.prefix_len;
        let first = number(group[0].subnet.base, prefix_len);
        let span = number(group[group.len() - 1].subnet.base, prefix_len) - first;
        let index = if most_common && span < DIRECT_SLOTS {
            let mut peers = vec![0; span as usize + 1];
            for route in group {
                peers[(number(route.subnet.base, prefix_len) - first) as usize] = route.peer.to_bits();
            }
            Index::Direct {
                first,
                peers: peers.into(),
            }
        } else {
            Index::Sorted(
                group
                    .iter()
                    .map(|route| (route.subnet.base, route.peer.to_bits()))
                    .collect(),
            )
        };
        Level { prefix_len, index }
    }

    /// The public IP of the peer with the longest prefix that holds `address`.
    pub fn find(&self, address: Ipv4Addr) -> Option<Ipv4Addr> {
        let address = address.to_bits();
        self.levels
            .iter()
            .find_map(|level| level.find(address))
            .map(Ipv4Addr::from_bits)
    }

    /// Is this some peer's public IP?
    pub fn is_peer(&self, address: Ipv4Addr) -> bool {
        self.peers.binary_search(&address.to_bits()).is_ok()
    }

    pub fn len(&self) -> usize {
        self.listed.len()
    }

    pub fn is_empty(&self) -> bool {
        self.listed.is_empty()
    }
}

/// Our own subnet as Python writes it: `172.17.41.1/24`.
impl FromStr for Subnet {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let parsed = text.split_once('/').and_then(|(address, prefix_len)| {
            let address: Ipv4Addr = address.parse().ok()?;
            let prefix_len: u8 = prefix_len.parse().ok()?;
            Self::holding(address, prefix_len).filter(|_| prefix_len > 0)
        });
        parsed.ok_or_else(|| format!("{text:?} is not an address with prefix length such as 172.17.41.1/24"))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn route(text: &str, peer: &str) -> Route {
        let (base, prefix_len) = text.split_once('/').unwrap();
        Route::new(
            base.parse().unwrap(),
            prefix_len.parse().unwrap(),
            peer.parse().unwrap(),
        )
        .unwrap()
    }

    fn at(address: &str) -> Ipv4Addr {
        address.parse().unwrap()
    }

    /// The look-up that anyone can see is right.
    fn linear(routes: &[Route], address: Ipv4Addr) -> Option<Ipv4Addr> {
        let holding = routes.iter().filter(|route| route.subnet.contains(address));
        holding
            .max_by_key(|route| route.subnet.prefix_len)
            .map(|route| route.peer)
    }

    #[test]
    fn the_longest_prefix_wins_whatever_the_order() {
        let lines = [
            route("172.17.0.0/16", "10.0.0.2"),
            route("172.17.7.0/24", "10.0.0.1"),
            route("172.17.7.128/25", "10.0.0.3"),
        ];
        for order in [[0, 1, 2], [2, 1, 0], [1, 0, 2]] {
            let table = Routes::new(order.map(|n: usize| lines[n])).unwrap();
            assert_eq!(table.find(at("172.17.7.9")), Some(at("10.0.0.1")));
            assert_eq!(table.find(at("172.17.7.129")), Some(at("10.0.0.3")));
            assert_eq!(table.find(at("172.17.99.1")), Some(at("10.0.0.2")));
            assert_eq!(table.find(at("172.18.0.0")), None);
        }
    }

    #[test]
    fn bad_routes_are_named() {
        let bad =
            |base: &str, prefix_len, peer: &str| Route::new(at(base), prefix_len, at(peer)).unwrap_err();
        assert_eq!(
            bad("172.17.7.77", 24, "10.0.0.1"),
            "172.17.7.77/24: host bits are set, 172.17.7.0/24 is meant"
        );
        assert_eq!(
            bad("172.17.7.0", 33, "10.0.0.1"),
            "172.17.7.0/33: the prefix length is over 32"
        );
        assert_eq!(
            bad("172.17.7.0", 24, "0.0.0.0"),
            "172.17.7.0/24: the public IP 0.0.0.0 is not a host's"
        );
        assert_eq!(
            bad("172.17.7.0", 24, "224.0.0.1"),
            "172.17.7.0/24: the public IP 224.0.0.1 is not a host's"
        );
        let twice = [
            route("172.17.7.0/24", "10.0.0.1"),
            route("172.17.7.0/24", "10.0.0.2"),
        ];
        assert_eq!(Routes::new(twice).unwrap_err(), "172.17.7.0/24: listed twice");
    }

    #[test]
    fn tables_with_the_same_routes_are_equal_in_any_order() {
        let (a, b) = (
            route("172.17.7.0/24", "10.0.0.1"),
            route("172.17.8.0/24", "10.0.0.2"),
        );
        assert_eq!(Routes::new([a, b]), Routes::new([b, a]));
        assert_ne!(Routes::new([a]), Routes::new([b]));
        assert!(Routes::new([]).unwrap().is_empty());
    }

    #[test]
    fn an_index_over_the_whole_address_space_is_not_built() {
        let table = Routes::new([
            route("0.0.0.0/32", "10.0.0.1"),
            route("255.255.255.255/32", "10.0.0.2"),
        ])
        .unwrap();
        assert_eq!(table.find(at("0.0.0.0")), Some(at("10.0.0.1")));
        assert_eq!(table.find(at("255.255.255.255")), Some(at("10.0.0.2")));
        assert_eq!(table.find(at("128.0.0.0")), None);
        assert!(matches!(table.levels[0].index, Index::Sorted(_)));
    }

    #[test]
    fn own_subnet_is_read_from_its_gateway() {
        assert_eq!(
            "172.17.41.1/24".parse::<Subnet>().unwrap().to_string(),
            "172.17.41.0/24"
        );
        for bad in [
            "",
            "172.17.41.1",
            "172.17.41.1/33",
            "172.17.41.1/0",
            "172.17.41/24",
            "::1/64",
            "172.17.41.1/+4x",
        ] {
            assert!(
                bad.parse::<Subnet>().unwrap_err().contains("172.17.41.1/24"),
                "{bad}"
            );
        }
    }

    /// Lengths and addresses from a small range, so that prefixes overlap and look-ups hit.
    fn any_route() -> impl Strategy<Value = Route> {
        let lengths = prop_oneof![Just(24_u8), Just(24), Just(24), 0_u8..=32];
        (prop_oneof![0_u32..4096, any::<u32>()], lengths, 1_u32..6).prop_map(|(bits, prefix_len, peer)| {
            let subnet = Subnet::holding(Ipv4Addr::from_bits(0x0ac0_0000 ^ bits << 4), prefix_len).unwrap();
            Route {
                subnet,
                peer: Ipv4Addr::from_bits(peer),
            }
        })
    }

    proptest! {
        #[test]
        fn equals_a_linear_scan(mut lines in prop::collection::vec(any_route(), 0..60), more in any::<Vec<u32>>()) {
            lines.sort_by_key(|route| route.subnet);
            lines.dedup_by_key(|route| route.subnet);
            let table = Routes::new(lines.clone()).unwrap();
            let edges = lines.iter().flat_map(|route| {
                let last = route.subnet.base | !mask(route.subnet.prefix_len);
                [route.subnet.base, last, route.subnet.base.wrapping_sub(1), last.wrapping_add(1)]
            });
            for bits in edges.chain(more) {
                let address = Ipv4Addr::from_bits(bits);
                prop_assert_eq!(table.find(address), linear(&lines, address), "{}", address);
            }
            for peer in 0..7 {
                let peer = Ipv4Addr::from_bits(peer);
                prop_assert_eq!(table.is_peer(peer), lines.iter().any(|route| route.peer == peer));
            }
        }
    }
}
