//! The decision about one packet: bytes and table in, one answer out. No I/O, clock, allocation or panic.
//!
//! Differences from flanneld's proxy, each on purpose: the TTL is left alone (the kernels on both ends count the
//! hop already, and traceroute shows no holes), the longest prefix wins, senders and inner addresses are checked,
//! and the ICMP answer comes from an address that Linux does not drop as martian.

use std::net::Ipv4Addr;
use std::str::FromStr;

use crate::counters::Reason;
use crate::icmp::{self, Unreachable};
use crate::packet::{Ipv4Packet, TCP};
use crate::routes::{Routes, Subnet};
use crate::transport::Transport;
use crate::virtio::Header;

/// How far the sender of a datagram is believed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PeerCheck {
    /// The outer source is the public IP of the peer whose subnet holds the inner source.
    Strict,
    /// The inner source lies in some peer's subnet (peers behind NAT have another outer address).
    Subnet,
    /// As flanneld: anybody may send anything.
    Off,
}

impl FromStr for PeerCheck {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "strict" => Ok(Self::Strict),
            "subnet" => Ok(Self::Subnet),
            "off" => Ok(Self::Off),
            other => Err(format!("peer check {other:?} is none of strict, subnet, off")),
        }
    }
}

/// What a host decides by, besides its routes.
#[derive(Debug, Clone, Copy)]
pub struct Rules {
    /// Our own subnet: the only place inner packets may be delivered to.
    pub own: Subnet,
    /// The TUN's, in bytes.
    pub mtu: usize,
    pub peer_check: PeerCheck,
}

/// What becomes of a packet the kernel gave us.
#[derive(Debug, PartialEq, Eq)]
pub enum FromTun<'a> {
    /// As payload of a datagram to this peer.
    Forward(Ipv4Addr),
    /// Not forwarded (`no_route`), and its sender may be told.
    Reply(Unreachable<'a>),
    Drop(Reason),
}

/// A packet from the TUN: who gets it? `unit` is the size of the largest packet it becomes on the wire.
pub fn from_tun<'a>(packet: Ipv4Packet<'a>, unit: usize, routes: &Routes, rules: &Rules) -> FromTun<'a> {
    let destination = packet.destination();
    // Our own subnet comes first: while its bridge is down the kernel sends such packets here, and a foreign lease
    // wide enough to hold it must not carry them away.
    let peer = if rules.own.contains(destination) || is_group(destination) {
        None
    } else {
        routes.find(destination)
    };
    match peer {
        Some(_) if unit > rules.mtu => FromTun::Drop(Reason::TooBig),
        Some(peer) => FromTun::Forward(peer),
        None if icmp::may_answer(packet) && !rules.own.is_broadcast(packet.source()) => {
            FromTun::Reply(Unreachable {
                source: unreachable_source(destination, rules),
                about: packet,
            })
        }
        None => FromTun::Drop(Reason::NoRoute),
    }
}

/// The .0 of the subnet that nobody has: it is routed to the TUN and is never local, so the answer is accepted even
/// with `rp_filter=1` and `accept_local=0`, where our own addresses would be martians. It tells the reader which
/// subnet is meant. Inside our own subnet that address *is* the TUN's, so there the destination speaks itself.
fn unreachable_source(destination: Ipv4Addr, rules: &Rules) -> Ipv4Addr {
    if rules.own.contains(destination) {
        return destination;
    }
    Subnet::holding(destination, rules.own.prefix_len()).map_or(destination, Subnet::base)
}

/// Multicast, limited broadcast and the reserved class E: never a container.
fn is_group(address: Ipv4Addr) -> bool {
    address.octets()[0] >= 224
}

/// A packet to deliver, and what an eBPF sender left to a network card that was never there.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Delivery<'a> {
    Whole(Ipv4Packet<'a>),
    /// The checksum field holds the pseudo header's sum only.
    Unfinished(Ipv4Packet<'a>, Transport),
    /// That, and it is to be cut into packets with this much payload.
    Uncut(Ipv4Packet<'a>, Transport, u16),
}

impl<'a> Delivery<'a> {
    pub fn packet(self) -> Ipv4Packet<'a> {
        match self {
            Self::Whole(packet) | Self::Unfinished(packet, _) | Self::Uncut(packet, ..) => packet,
        }
    }

    /// What to tell the TUN, if anything.
    pub fn header(self) -> Option<Header> {
        match self {
            Self::Whole(_) => None,
            Self::Unfinished(_, transport) => Some(Header::needs_checksum(transport)),
            Self::Uncut(_, transport, size) => Some(Header::super_packet(transport, size)),
        }
    }
}

/// A datagram from `sender`: the packet to deliver, or why not.
pub fn from_peer<'a>(
    datagram: &'a [u8],
    sender: Ipv4Addr,
    routes: &Routes,
    rules: &Rules,
) -> Result<Delivery<'a>, Reason> {
    if rules.peer_check == PeerCheck::Strict && !routes.is_peer(sender) {
        return Err(Reason::UnknownSender);
    }
    let packet = Ipv4Packet::parse(datagram)?;
    let (source, destination) = (packet.source(), packet.destination());
    let believed = match rules.peer_check {
        PeerCheck::Off => true,
        PeerCheck::Subnet => routes.find(source).is_some() || (source == sender && routes.is_peer(sender)),
        // A process on the peer itself that is bound to the public IP: flanneld carries its packets unmasqueraded.
        PeerCheck::Strict => routes.find(source) == Some(sender) || source == sender,
    };
    if !believed || (rules.own.contains(source) && rules.peer_check != PeerCheck::Off) {
        return Err(Reason::SpoofedSource);
    }
    if !rules.own.contains(destination) || rules.own.is_broadcast(destination) || is_group(destination) {
        return Err(Reason::ForeignDestination);
    }
    let fits = datagram.len() <= rules.mtu;
    let left_to_do = |transport: &Transport| {
        if fits {
            transport.is_unfinished(packet)
        } else {
            transport.looks_unfinished(packet)
        }
    };
    match Transport::of(packet).filter(left_to_do) {
        None if fits => Ok(Delivery::Whole(packet)),
        Some(transport) if fits => Ok(Delivery::Unfinished(packet, transport)),
        Some(transport) if transport.protocol == TCP && transport.end < rules.mtu => {
            // The MTU fits 16 bits, as no UDP payload is longer.
            Ok(Delivery::Uncut(
                packet,
                transport,
                (rules.mtu - transport.end) as u16,
            ))
        }
        _ => Err(Reason::TooBig),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::packet::UDP;
    use crate::routes::Route;
    use crate::transport::tests::{unfinished, valid};

    const OWN: &str = "172.17.41.1/24";
    const PEER: Ipv4Addr = Ipv4Addr::new(10, 0, 0, 2);
    const OTHER: Ipv4Addr = Ipv4Addr::new(10, 0, 0, 3);
    const STRANGER: Ipv4Addr = Ipv4Addr::new(10, 0, 0, 9);

    fn rules(peer_check: PeerCheck) -> Rules {
        Rules {
            own: OWN.parse().unwrap(),
            mtu: 1472,
            peer_check,
        }
    }

    /// 172.17.7.0/24 at PEER, 172.17.8.0/24 at OTHER.
    fn routes() -> Routes {
        let line = |third, peer| Route::new(Ipv4Addr::new(172, 17, third, 0), 24, peer).unwrap();
        Routes::new([line(7, PEER), line(8, OTHER)]).unwrap()
    }

    fn packet(source: [u8; 4], destination: [u8; 4], length: usize) -> Vec<u8> {
        let mut bytes = vec![0; length];
        bytes[0] = 0x45;
        bytes[2..4].copy_from_slice(&(length as u16).to_be_bytes());
        bytes[8] = 64;
        bytes[9] = 17;
        bytes[12..16].copy_from_slice(&source);
        bytes[16..20].copy_from_slice(&destination);
        bytes
    }

    fn received(bytes: &[u8], sender: Ipv4Addr, check: PeerCheck) -> Result<usize, Reason> {
        from_peer(bytes, sender, &routes(), &rules(check)).map(|delivery| delivery.packet().bytes().len())
    }

    fn sent(bytes: &[u8]) -> FromTun<'_> {
        from_tun(
            Ipv4Packet::parse(bytes).unwrap(),
            bytes.len(),
            &routes(),
            &rules(PeerCheck::Strict),
        )
    }

    #[test]
    fn only_the_peer_that_holds_the_inner_source_may_send_from_it() {
        use PeerCheck::{Off, Strict, Subnet};
        let from = |third| packet([172, 17, third, 9], [172, 17, 41, 5], 40);
        for (third, sender, check, wanted) in [
            (7, PEER, Strict, Ok(40)),
            (7, OTHER, Strict, Err(Reason::SpoofedSource)),
            (9, PEER, Strict, Err(Reason::SpoofedSource)),
            (41, PEER, Strict, Err(Reason::SpoofedSource)),
            (7, STRANGER, Strict, Err(Reason::UnknownSender)),
            (7, STRANGER, Subnet, Ok(40)),
            (9, STRANGER, Subnet, Err(Reason::SpoofedSource)),
            (41, PEER, Subnet, Err(Reason::SpoofedSource)),
            (9, STRANGER, Off, Ok(40)),
        ] {
            assert_eq!(
                received(&from(third), sender, check),
                wanted,
                "{third} {sender} {check:?}"
            );
        }
    }

    #[test]
    fn a_peer_may_speak_from_its_own_public_ip_and_from_no_other() {
        let from = |source: Ipv4Addr| packet(source.octets(), [172, 17, 41, 5], 40);
        for check in [PeerCheck::Strict, PeerCheck::Subnet] {
            assert_eq!(received(&from(PEER), PEER, check), Ok(40));
            assert_eq!(received(&from(OTHER), PEER, check), Err(Reason::SpoofedSource));
        }
        assert_eq!(
            received(&from(STRANGER), STRANGER, PeerCheck::Strict),
            Err(Reason::UnknownSender)
        );
        assert_eq!(
            received(&from(STRANGER), STRANGER, PeerCheck::Subnet),
            Err(Reason::SpoofedSource)
        );
    }

    #[test]
    fn packets_are_delivered_inside_our_own_subnet_only() {
        for check in [PeerCheck::Strict, PeerCheck::Subnet, PeerCheck::Off] {
            let to = |destination| received(&packet([172, 17, 7, 9], destination, 40), PEER, check);
            assert_eq!(to([172, 17, 41, 0]), Ok(40), "our TUN's own address is inside");
            assert_eq!(to([172, 17, 41, 1]), Ok(40));
            for foreign in [
                [172, 17, 7, 1],
                [10, 0, 0, 1],
                [224, 0, 0, 1],
                [255; 4],
                [172, 17, 41, 255],
            ] {
                assert_eq!(to(foreign), Err(Reason::ForeignDestination), "{foreign:?}");
            }
        }
    }

    #[test]
    fn a_datagram_has_the_length_it_says_and_fits_the_mtu() {
        let whole = packet([172, 17, 7, 9], [172, 17, 41, 5], 1472);
        assert_eq!(received(&whole, PEER, PeerCheck::Strict), Ok(1472));
        assert_eq!(
            received(&whole[..1471], PEER, PeerCheck::Strict),
            Err(Reason::BadLength)
        );
        assert_eq!(
            received(&[&whole[..], &[0]].concat(), PEER, PeerCheck::Strict),
            Err(Reason::BadLength)
        );
        let long = packet([172, 17, 7, 9], [172, 17, 41, 5], 1473);
        assert_eq!(received(&long, PEER, PeerCheck::Strict), Err(Reason::TooBig));
        assert_eq!(received(&[0x45; 19], PEER, PeerCheck::Strict), Err(Reason::Short));
        assert_eq!(
            received(&[0x60; 40], PEER, PeerCheck::Strict),
            Err(Reason::BadVersion)
        );
    }

    #[test]
    fn what_the_sender_left_unfinished_or_uncut_is_marked() {
        let deliver = |bytes: &[u8]| {
            from_peer(bytes, PEER, &routes(), &rules(PeerCheck::Strict)).map(|delivery| match delivery {
                Delivery::Whole(_) => "whole",
                Delivery::Unfinished(..) => "unfinished",
                Delivery::Uncut(_, transport, size) => {
                    assert_eq!(usize::from(size), 1472 - transport.end);
                    "uncut"
                }
            })
        };
        let long = vec![1; 60_000];
        assert_eq!(deliver(&valid(TCP, &[1; 100])), Ok("whole"));
        assert_eq!(deliver(&unfinished(valid(TCP, &[1; 100]))), Ok("unfinished"));
        assert_eq!(deliver(&unfinished(valid(UDP, &[1; 100]))), Ok("unfinished"));
        assert_eq!(deliver(&unfinished(valid(TCP, &long))), Ok("uncut"));
        assert_eq!(
            deliver(&valid(TCP, &long)),
            Err(Reason::TooBig),
            "not an offload: just too big"
        );
        assert_eq!(deliver(&unfinished(valid(UDP, &long))), Err(Reason::TooBig));
    }

    #[test]
    fn a_packet_yet_to_be_cut_is_known_whatever_its_payload_sums_up_to() {
        let mut bytes = unfinished(valid(TCP, &vec![1; 60_000]));
        bytes[40..42].fill(0);
        let packet = Ipv4Packet::parse(&bytes).unwrap();
        let transport = Transport::of(packet).unwrap();
        // What the first word of the payload must be for the whole to sum up: ones' complement, as everywhere here.
        let pseudo = u16::from_ne_bytes([bytes[36], bytes[37]]);
        let (sum, carry) = (!transport.finished(packet)).overflowing_add(pseudo);
        let word = !(sum + u16::from(carry));
        bytes[40..42].copy_from_slice(&word.to_ne_bytes());
        let packet = Ipv4Packet::parse(&bytes).unwrap();
        assert!(transport.checksum_holds(packet));
        let delivery = from_peer(&bytes, PEER, &routes(), &rules(PeerCheck::Strict));
        assert!(matches!(delivery, Ok(Delivery::Uncut(..))));
    }

    #[test]
    fn what_nobody_has_is_answered_from_the_subnet_that_is_missing() {
        let lost = packet([172, 17, 41, 5], [172, 17, 99, 7], 40);
        let FromTun::Reply(unreachable) = sent(&lost) else {
            panic!("no answer")
        };
        assert_eq!(unreachable.source, Ipv4Addr::new(172, 17, 99, 0));
        let own = packet([172, 17, 99, 7], [172, 17, 41, 5], 40);
        let FromTun::Reply(unreachable) = sent(&own) else {
            panic!("no answer")
        };
        assert_eq!(
            unreachable.source,
            Ipv4Addr::new(172, 17, 41, 5),
            "the subnet's base would be our own address"
        );
    }

    #[test]
    fn a_wide_foreign_lease_carries_neither_our_own_subnet_nor_multicast_away() {
        let everything = Routes::new([Route::new(Ipv4Addr::UNSPECIFIED, 0, PEER).unwrap()]).unwrap();
        for destination in [[172, 17, 41, 5], [224, 0, 0, 251], [255; 4]] {
            let bytes = packet([172, 17, 41, 9], destination, 40);
            let packet = Ipv4Packet::parse(&bytes).unwrap();
            let verdict = from_tun(packet, 40, &everything, &rules(PeerCheck::Strict));
            assert!(!matches!(verdict, FromTun::Forward(_)), "{destination:?}");
        }
    }

    #[test]
    fn what_is_larger_than_the_mtu_on_the_wire_is_not_sent() {
        let bytes = packet([172, 17, 41, 5], [172, 17, 7, 7], 1473);
        assert_eq!(sent(&bytes), FromTun::Drop(Reason::TooBig));
        let packet = Ipv4Packet::parse(&bytes).unwrap();
        assert_eq!(
            from_tun(packet, 1472, &routes(), &rules(PeerCheck::Strict)),
            FromTun::Forward(PEER)
        );
    }

    /// Bytes that are often nearly right, so that the deeper checks are reached.
    fn nearly() -> impl Strategy<Value = Vec<u8>> {
        let address = || {
            prop_oneof![
                (prop_oneof![Just(7_u8), Just(8), Just(9), Just(41)], any::<u8>())
                    .prop_map(|(c, d)| [172, 17, c, d]),
                Just(PEER.octets()),
                any::<[u8; 4]>(),
            ]
        };
        let rest = prop::collection::vec(any::<u8>(), 0..64);
        let change = prop::option::of((any::<prop::sample::Index>(), any::<u8>()));
        let sensible =
            (address(), address(), rest, change).prop_map(|(source, destination, rest, change)| {
                let mut bytes = packet(source, destination, 20 + rest.len());
                bytes[20..].copy_from_slice(&rest);
                if let Some((at, value)) = change {
                    let at = at.index(bytes.len());
                    bytes[at] = value;
                }
                bytes
            });
        prop_oneof![4 => sensible, 1 => prop::collection::vec(any::<u8>(), 0..100)]
    }

    proptest! {
        #[test]
        fn never_panics_and_never_delivers_what_is_forbidden(
            bytes in nearly(),
            sender in prop_oneof![Just(PEER), Just(OTHER), Just(STRANGER)],
            check in prop_oneof![Just(PeerCheck::Strict), Just(PeerCheck::Subnet), Just(PeerCheck::Off)],
        ) {
            let own: Subnet = OWN.parse().unwrap();
            if let Ok(delivery) = from_peer(&bytes, sender, &routes(), &rules(check)) {
                let packet = delivery.packet();
                prop_assert_eq!(packet.bytes(), &bytes[..], "exactly the datagram, nothing else");
                prop_assert_eq!(bytes[0] >> 4, 4);
                prop_assert_eq!(usize::from(u16::from_be_bytes([bytes[2], bytes[3]])), bytes.len());
                prop_assert!(own.contains(packet.destination()));
                prop_assert_ne!(packet.destination().octets()[3], 255);
                let holder = routes().find(packet.source());
                match check {
                    PeerCheck::Strict => {
                        prop_assert_ne!(sender, STRANGER);
                        prop_assert!(holder == Some(sender) || packet.source() == sender);
                    }
                    PeerCheck::Subnet => prop_assert!(holder.is_some() || packet.source() == sender),
                    PeerCheck::Off => {}
                }
            }
        }

        #[test]
        fn a_packet_from_the_tun_goes_to_the_peer_that_has_its_destination_or_nowhere(bytes in nearly()) {
            let Ok(packet) = Ipv4Packet::parse(&bytes) else { return Ok(()) };
            match sent(&bytes) {
                FromTun::Forward(peer) => prop_assert_eq!(routes().find(packet.destination()), Some(peer)),
                FromTun::Reply(unreachable) => {
                    prop_assert!(icmp::may_answer(packet));
                    let mut out = [0; icmp::MAX_LEN];
                    let length = unreachable.write(&mut out);
                    let answer = Ipv4Packet::parse(&out[..length]);
                    prop_assert_eq!(answer.map(Ipv4Packet::destination), Ok(packet.source()));
                    prop_assert!(!icmp::may_answer(answer.unwrap()), "never an error about our own error");
                }
                FromTun::Drop(reason) => prop_assert_eq!(reason, Reason::NoRoute),
            }
        }
    }
}
