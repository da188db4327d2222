//! flannel's own packet proxy, byte for byte, against ours.
//!
//! `tests/vectors/udp-proxy.json` holds inputs and outputs of the real C proxy. A case that is not in `DIFFERENCES`
//! must give the same bytes here; a case that is must differ in exactly the way written there, and for that reason.

#![expect(clippy::unwrap_used, reason = "a test that panics has failed")]

use std::net::Ipv4Addr;

use dataplane::forward::{self, FromTun, PeerCheck, Rules};
use dataplane::icmp;
use dataplane::packet::Ipv4Packet;
use dataplane::routes::{Route, Routes};
use serde_json::Value;

const PEER1: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 1);
const PEER2: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 2);
const STRANGER: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 99);

/// What came out: to a peer, into the TUN, or nowhere.
#[derive(Debug, Default, PartialEq, Eq, Clone)]
struct Output {
    peer1: Option<Vec<u8>>,
    peer2: Option<Vec<u8>>,
    tun: Option<Vec<u8>>,
}

/// How our answer differs, given flannel's answer and the input.
enum Difference {
    /// Same place, but the TTL and the header checksum are the input's.
    TtlUntouched,
    /// As `TtlUntouched`, but flannel dropped it or sent it to the other peer.
    Forwarded { to_peer: u8 },
    /// Not sent anywhere.
    Dropped,
    /// An ICMP answer from another address, as hex.
    Answered(&'static str),
    /// Nothing to compare: about flannel's internals.
    NotAPacket,
}
use Difference::{Answered, Dropped, Forwarded, NotAPacket, TtlUntouched};

const KERNELS_COUNT: &str =
    "both hosts' kernels count the hop when they forward; a second decrement hides hops from traceroute";

/// Direction, case, difference, reason.
#[rustfmt::skip]
const DIFFERENCES: &[(&str, &str, Difference, &str)] = &[
    ("from TUN", "checksum field ffff before", TtlUntouched, KERNELS_COUNT),
    ("from TUN", "checksum field ff12 before", TtlUntouched, KERNELS_COUNT),
    ("from TUN", "TTL 1", Forwarded { to_peer: 1 }, "the TTL is the kernel's business, and it has passed this one"),
    ("from TUN", "TTL 0", TtlUntouched, "flanneld wraps to 255; nobody does that to a packet on purpose"),
    ("from TUN", "no route", Answered(
        "450000400000000040013195ac11c800ac1129050300bab500000000\
         450000241234000040111f6cac112905ac11c8014142434445464748494a4b4c4d4e4f50"),
        "from the base of the destination's subnet, which Linux does not drop as martian; the whole packet is quoted \
         (RFC 1812), TTL 64"),
    ("from TUN", "routed fragment", TtlUntouched, KERNELS_COUNT),
    ("from TUN", "destination broadcast/multicast", Dropped, "RFC 1122 forbids ICMP errors about multicast"),
    ("from TUN", "dst only in /16", TtlUntouched, KERNELS_COUNT),
    ("from TUN", "dst in both again after swap", Forwarded { to_peer: 1 }, "the longest prefix wins, not the last used"),
    ("from TUN", "after delete", TtlUntouched, KERNELS_COUNT),
    ("from TUN", "replaced next hop", TtlUntouched, KERNELS_COUNT),
    ("from UDP socket", "valid inner packet", TtlUntouched, KERNELS_COUNT),
    ("from UDP socket", "TTL 1", Forwarded { to_peer: 0 }, "the TTL is the kernel's business: it will drop or answer"),
    ("from UDP socket", "unknown outer sender", Dropped, "any host that reaches the port could inject"),
    ("from UDP socket", "datagram longer than the tunnel MTU", Dropped, "flanneld cuts it, which corrupts it"),
    ("", "stop", NotAPacket, "a control message of flannel's; ours is `DataPlane::stop`"),
];

fn bytes(value: &Value) -> Option<Vec<u8>> {
    value.as_str().map(unhex)
}

fn unhex(text: &str) -> Vec<u8> {
    text.as_bytes()
        .chunks(2)
        .map(|pair| u8::from_str_radix(std::str::from_utf8(pair).unwrap(), 16).unwrap())
        .collect()
}

fn vectors() -> Vec<Value> {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../../tests/vectors/udp-proxy.json");
    let file: Value = serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap();
    file["vectors"].as_array().unwrap().clone()
}

/// The routes flannel's proxy had at that moment: the recording adds, deletes and replaces as it goes on.
fn routes_before(case: &str) -> Routes {
    let route = |base: [u8; 4], prefix_len, peer| Route::new(base.into(), prefix_len, peer).unwrap();
    let narrow = |peer| route([172, 17, 7, 0], 24, peer);
    let wide = route([172, 17, 0, 0], 16, PEER2);
    let lines = match case {
        "dst only in /16" | "dst in both again after swap" => vec![narrow(PEER1), wide],
        "replaced next hop" => vec![narrow(PEER2)],
        _ => vec![narrow(PEER1)],
    };
    Routes::new(lines).unwrap()
}

fn ours(direction: &str, case: &str, input: &[u8]) -> Output {
    let rules = Rules {
        own: "172.17.41.1/24".parse().unwrap(),
        mtu: 1472,
        peer_check: PeerCheck::Strict,
    };
    let routes = routes_before(case);
    let mut output = Output::default();
    if direction == "from TUN" {
        let Ok(packet) = Ipv4Packet::parse(input) else {
            return output;
        };
        match forward::from_tun(packet, input.len(), &routes, &rules) {
            FromTun::Forward(PEER1) => output.peer1 = Some(input.to_vec()),
            FromTun::Forward(PEER2) => output.peer2 = Some(input.to_vec()),
            FromTun::Forward(other) => panic!("{case}: forwarded to {other}"),
            FromTun::Reply(unreachable) => {
                let mut answer = [0; icmp::MAX_LEN];
                let length = unreachable.write(&mut answer);
                output.tun = Some(answer[..length].to_vec());
            }
            FromTun::Drop(_) => {}
        }
    } else {
        let sender = if case == "unknown outer sender" {
            STRANGER
        } else {
            PEER1
        };
        let verdict = forward::from_peer(input, sender, &routes, &rules);
        output.tun = verdict.ok().map(|delivery| delivery.packet().bytes().to_vec());
    }
    output
}

#[test]
fn every_recorded_case_is_equal_or_differs_as_intended() {
    let mut unused: Vec<_> = DIFFERENCES
        .iter()
        .map(|(direction, case, ..)| (*direction, *case))
        .collect();
    for vector in vectors() {
        let text = |key: &str| vector[key].as_str().unwrap_or_default().to_owned();
        let (direction, case) = (text("direction"), text("case"));
        let flannels = Output {
            peer1: bytes(&vector["udp_to_peer1"]),
            peer2: bytes(&vector["udp_to_peer2"]),
            tun: bytes(&vector["written_to_tun"]),
        };
        let difference = DIFFERENCES
            .iter()
            .find(|(d, c, ..)| *d == direction && *c == case);
        unused.retain(|entry| *entry != (direction.as_str(), case.as_str()));
        if matches!(difference, Some((_, _, NotAPacket, _))) {
            continue;
        }

        let input = bytes(&vector["in"]).unwrap_or_else(|| panic!("{case}: no input"));
        let got = ours(&direction, &case, &input);
        let Some((.., difference, reason)) = difference else {
            assert_eq!(got, flannels, "{direction}, {case}: not an intended difference");
            continue;
        };
        assert_ne!(
            got, flannels,
            "{direction}, {case}: no longer different ({reason})"
        );
        let wanted = match difference {
            TtlUntouched => {
                for theirs in [&flannels.peer1, &flannels.peer2, &flannels.tun]
                    .into_iter()
                    .flatten()
                {
                    assert_eq!(
                        masked(theirs),
                        masked(&input),
                        "{case}: differs in more than the TTL"
                    );
                }
                Output {
                    peer1: flannels.peer1.map(|_| input.clone()),
                    peer2: flannels.peer2.map(|_| input.clone()),
                    tun: flannels.tun.map(|_| input.clone()),
                }
            }
            Forwarded { to_peer: 0 } => Output {
                tun: Some(input.clone()),
                ..Output::default()
            },
            Forwarded { to_peer: 1 } => Output {
                peer1: Some(input.clone()),
                ..Output::default()
            },
            Forwarded { .. } => Output {
                peer2: Some(input.clone()),
                ..Output::default()
            },
            Dropped => Output::default(),
            Answered(hex) => Output {
                tun: Some(unhex(&hex.replace(' ', ""))),
                ..Output::default()
            },
            NotAPacket => continue,
        };
        assert_eq!(got, wanted, "{direction}, {case}: {reason}");
    }
    assert!(
        unused.is_empty(),
        "differences that no vector exercises: {unused:?}"
    );
}

/// Without the bytes flanneld changes: TTL and header checksum.
fn masked(packet: &[u8]) -> Vec<u8> {
    let mut packet = packet.to_vec();
    packet[8] = 0;
    packet[10..12].fill(0);
    packet
}
