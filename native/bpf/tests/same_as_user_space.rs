//! The TC programs decide as the user-space path does and make the same bytes: `BPF_PROG_TEST_RUN` beside
//! `dataplane::forward`, over random packets and over flannel's recorded ones.
//!
//! Needs root and a kernel with BPF, so plain `cargo test` passes it over; `make test` as root does not. Each test is in
//! a network namespace of its own, made by `unshare` for its thread, with an underlay `eth0` and a TUN.

#![expect(clippy::unwrap_used, reason = "a test that panics has failed")]

use std::fs;
use std::net::Ipv4Addr;
use std::process::Command;

use dataplane::forward::{FromTun, PeerCheck, Rules, from_peer, from_tun};
use dataplane::packet::Ipv4Packet;
use dataplane::routes::{Route, Routes};
use kernelpath::{Bench, KernelPath, Outcome, Peer, Settings, datagram_of, expect, frame, probe};
use proptest::prelude::*;
use proptest::test_runner::{Config, TestRunner};

const LOCAL: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 11);
const PORT: u16 = 8285;
const MTU: u16 = 1472;
/// Who has which subnet; 172.17.41.0/24 is ours. The last two are of foreign lengths.
const PEERS: [(&str, u8, [u8; 4]); 5] = [
    ("172.17.7.0", 24, [192, 0, 2, 12]),
    ("172.17.8.0", 24, [192, 0, 2, 13]),
    ("172.17.0.0", 24, [203, 0, 113, 9]), // beyond a router
    ("172.17.8.128", 25, [192, 0, 2, 14]),
    ("172.18.0.0", 16, [192, 0, 2, 15]),
];
const PLAIN: usize = 3;

fn shell(script: &str) {
    let done = Command::new("sh").args(["-ec", script]).output().unwrap();
    assert!(
        done.status.success(),
        "{script}: {}",
        String::from_utf8_lossy(&done.stderr)
    );
}

fn index(name: &str) -> u32 {
    // /sys shows the namespace it was mounted in; /proc/thread-self/net the thread's own.
    let listed = Command::new("ip")
        .args(["-o", "link", "show", name])
        .output()
        .unwrap();
    let text = String::from_utf8(listed.stdout).unwrap();
    text.split(':').next().unwrap().parse().unwrap()
}

/// A namespace of this thread's: eth0 with 192.0.2.11/24 and a default route, flannel0, forwarding on.
fn settings(check: PeerCheck) -> Settings {
    // SAFETY: it only moves this thread, which makes no other use of its former namespace.
    let moved = unsafe { libc::unshare(libc::CLONE_NEWNET) };
    assert_eq!(moved, 0, "unshare needs root");
    shell(
        "ip link set lo up; ip link add eth0 type veth peer name far0; ip link set far0 up
         ip addr add 192.0.2.11/24 dev eth0; ip link set eth0 up; ip route add default via 192.0.2.1
         ip tuntap add flannel0 mode tun; ip link set flannel0 mtu 1472 up",
    );
    fs::write("/proc/sys/net/ipv4/ip_forward", "1").unwrap();
    Settings {
        valid_until: u64::MAX,
        tun: index("flannel0"),
        local: LOCAL,
        port: PORT,
        mtu: MTU,
        peer_check: check as u32,
        network: (Ipv4Addr::new(172, 17, 0, 0), 16),
        own: (Ipv4Addr::new(172, 17, 41, 0), 24),
        uplinks: vec![index("eth0")],
        rx_port: 0,
    }
}

fn peers(count: usize) -> Vec<Peer> {
    PEERS[..count]
        .iter()
        .map(|(base, length, address)| Peer {
            base: base.parse().unwrap(),
            length: *length,
            address: (*address).into(),
            direct: true,
        })
        .collect()
}

struct Both {
    bench: Bench,
    settings: Settings,
    routes: Routes,
    rules: Rules,
}

impl Both {
    fn new(check: PeerCheck, peer_count: usize) -> Self {
        let settings = settings(check);
        let mut bench = Bench::new(settings.network, 24).unwrap();
        bench.path.configure(&settings).unwrap();
        let peers = peers(peer_count);
        assert!(bench.path.replace_peers(&peers).unwrap());
        assert!(
            !bench.path.replace_peers(&peers).unwrap(),
            "the same again changes nothing"
        );
        let routes = peers
            .iter()
            .map(|peer| Route::new(peer.base, peer.length, peer.address).unwrap());
        Self {
            bench,
            settings,
            routes: Routes::new(routes).unwrap(),
            rules: Rules {
                own: "172.17.41.1/24".parse().unwrap(),
                mtu: MTU.into(),
                peer_check: check,
            },
        }
    }

    /// A packet from the TUN: both send the same datagram to the same peer, or the kernel leaves it alone.
    fn send(&mut self, packet: &[u8]) {
        if packet.len() < 20 {
            return; // BPF_PROG_TEST_RUN takes no IPv4 frame without a whole header
        }
        let wanted =
            Ipv4Packet::parse(packet).map(|parsed| from_tun(parsed, packet.len(), &self.routes, &self.rules));
        let done = self.bench.encapsulate(packet).unwrap();
        match (wanted, done) {
            (Ok(FromTun::Forward(peer)), Outcome::Redirected(datagram)) => {
                expect(&datagram, packet, &self.settings, peer).unwrap();
                assert_eq!(self.bench.moved().unwrap(), ["out_packets", "out_bytes"]);
            }
            (Ok(FromTun::Reply(_) | FromTun::Drop(_)) | Err(_), Outcome::Passed) => {}
            (wanted, done) => panic!("user space {wanted:?}, kernel {done:?} for {packet:02x?}"),
        }
    }

    /// A datagram: both deliver the same packet, or drop it for the same reason.
    fn receive(&mut self, payload: &[u8], sender: Ipv4Addr) {
        let wanted = from_peer(payload, sender, &self.routes, &self.rules);
        let frame = frame(&datagram_of(payload, sender, LOCAL, PORT));
        let done = self.bench.decapsulate(&frame).unwrap();
        let moved = self.bench.moved().unwrap();
        match (wanted, done) {
            (Ok(delivery), Outcome::Redirected(packet)) => {
                assert_eq!(packet, delivery.packet().bytes());
                assert_eq!(moved, ["in_packets", "in_bytes"]);
            }
            (Err(dataplane::counters::Reason::TooBig), Outcome::Passed) => {
                assert_eq!(moved, ["pass_too_big"]);
            }
            (Err(reason), Outcome::Dropped) => assert_eq!(moved, [format!("drop_{}", reason.name())]),
            (wanted, done) => {
                panic!("user space {wanted:?}, kernel {done:?} from {sender} for {payload:02x?}")
            }
        }
    }
}

/// Addresses of which many mean something here.
fn address() -> impl Strategy<Value = [u8; 4]> {
    prop_oneof![
        6 => (prop::sample::select(vec![0, 7, 8, 41, 99]), any::<u8>()).prop_map(|(third, last)| [172, 17, third, last]),
        2 => prop::sample::select(vec![[172, 17, 41, 255], [172, 18, 3, 4], [224, 0, 0, 5], [255; 4], [0; 4], [240, 1, 2, 3]]),
        2 => (11_u8..17).prop_map(|last| [192, 0, 2, last]),
        1 => any::<[u8; 4]>(),
    ]
}

fn right() -> impl Strategy<Value = Vec<u8>> {
    (
        address(),
        address(),
        20_usize..200,
        prop::sample::select(vec![1_u8, 6, 17, 132]),
        any::<[u8; 4]>(),
    )
        .prop_map(|(source, destination, length, protocol, more)| {
            let mut bytes = vec![
                0x45,
                more[0],
                0,
                0,
                more[1],
                more[2],
                more[3] & 0x3f,
                0,
                64,
                protocol,
                0,
                0,
            ];
            bytes.extend(source);
            bytes.extend(destination);
            bytes.resize(length, 0xa5);
            bytes[2..4].copy_from_slice(&(length as u16).to_be_bytes());
            bytes
        })
}

/// Packets that are right as a rule, and wrong in one field or in all now and then.
fn packet() -> impl Strategy<Value = Vec<u8>> {
    let spoilt = (right(), 0_usize..4, any::<u8>()).prop_map(|(mut bytes, at, byte)| {
        bytes[at] = byte;
        bytes
    });
    let edge = (right(), 1465_usize..1480).prop_map(|(mut bytes, length)| {
        bytes.resize(length, 0x5a);
        bytes[2..4].copy_from_slice(&(length as u16).to_be_bytes());
        bytes
    });
    prop_oneof![6 => right(), 2 => spoilt, 1 => edge, 1 => prop::collection::vec(any::<u8>(), 0..80)]
}

/// Not the macro: one namespace serves all cases.
fn over<S: Strategy>(strategy: &S, mut check: impl FnMut(S::Value)) {
    let mut runner = TestRunner::new(Config {
        cases: 2000,
        failure_persistence: None,
        ..Config::default()
    });
    let check = std::cell::RefCell::new(&mut check);
    runner
        .run(strategy, |value| {
            (check.borrow_mut())(value);
            Ok(())
        })
        .unwrap();
}

#[test]
#[ignore = "needs root and BPF"]
fn every_packet_from_the_tun_goes_where_user_space_sends_it_in_the_same_bytes() {
    for count in [PLAIN, PEERS.len()] {
        let mut both = Both::new(PeerCheck::Strict, count);
        over(&packet(), |packet| {
            both.send(&packet);
        });
    }
}

#[test]
#[ignore = "needs root and BPF"]
fn every_datagram_is_delivered_or_dropped_as_in_user_space() {
    for (check, count) in [
        (PeerCheck::Strict, PLAIN),
        (PeerCheck::Strict, PEERS.len()),
        (PeerCheck::Subnet, PEERS.len()),
        (PeerCheck::Off, PLAIN),
    ] {
        let mut both = Both::new(check, count);
        over(&(packet(), address()), |(payload, sender)| {
            both.receive(&payload, sender.into());
        });
    }
}

#[test]
#[ignore = "needs root and BPF"]
fn flannels_recorded_packets_are_carried_as_user_space_carries_them() {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../../tests/vectors/udp-proxy.json");
    let document: serde_json::Value = serde_json::from_str(&fs::read_to_string(path).unwrap()).unwrap();
    let vectors = document["vectors"].as_array().unwrap();
    let mut both = Both::new(PeerCheck::Strict, PLAIN);
    let (mut sent, mut received) = (0, 0);
    for vector in vectors {
        let Some(text) = vector["in"].as_str() else {
            continue; // made by a rule, not written out
        };
        let bytes: Vec<u8> = (0..text.len() / 2)
            .map(|at| u8::from_str_radix(&text[2 * at..2 * at + 2], 16).unwrap())
            .collect();
        if vector["direction"] == "from TUN" {
            both.send(&bytes);
            sent += 1;
        } else {
            for sender in [[192, 0, 2, 12], [192, 0, 2, 99]] {
                both.receive(&bytes, sender.into());
            }
            received += 1;
        }
    }
    assert!(sent >= 10 && received >= 5, "{sent} and {received} vectors");
}

#[test]
#[ignore = "needs root and BPF"]
fn what_the_kernel_does_not_know_to_be_for_it_goes_on_to_the_stack() {
    let mut both = Both::new(PeerCheck::Strict, PLAIN);
    let mut inner = datagram_of(b"payload", [172, 17, 7, 9].into(), [172, 17, 41, 5].into(), 9);
    inner[8] = 1;
    let good = frame(&datagram_of(&inner, [192, 0, 2, 12].into(), LOCAL, PORT));
    assert_eq!(
        both.bench.decapsulate(&good).unwrap(),
        Outcome::Redirected(inner.clone())
    );
    let mut change = |at: usize, byte: u8, moved: &[&str]| {
        let mut bytes = good.clone();
        bytes[at] = byte;
        assert_eq!(
            both.bench.decapsulate(&bytes).unwrap(),
            Outcome::Passed,
            "byte {at} {byte}"
        );
        assert_eq!(both.bench.moved().unwrap(), moved, "byte {at} {byte}");
    };
    change(0, 1, &[]); // a group's MAC
    change(1, 7, &[]); // another host's
    change(12, 0x86, &[]); // not IPv4
    change(14, 0x46, &[]); // options
    change(14 + 6, 0x20, &["pass_other"]); // a fragment
    change(14 + 7, 1, &["pass_other"]); // a later one
    change(14 + 3, 70, &["pass_other"]); // a length that is not there
    change(14 + 9, 6, &[]); // TCP
    change(14 + 19, 12, &[]); // another address of ours
    change(14 + 23, 1, &[]); // another port
    change(14 + 25, 1, &["pass_other"]); // UDP's length
}

/// What a socket sends over a virtual wire: the field has the pseudo-header's sum (RFC 768) and no checksum yet.
#[test]
#[ignore = "needs root and BPF"]
fn a_datagram_whose_outer_checksum_is_still_to_be_made_goes_to_user_space() {
    let mut both = Both::new(PeerCheck::Strict, PLAIN);
    let inner = datagram_of(b"payload", [172, 17, 7, 9].into(), [172, 17, 41, 5].into(), 9);
    let mut outer = datagram_of(&inner, [192, 0, 2, 12].into(), LOCAL, PORT);
    let mut words: Vec<u8> = outer[12..20].to_vec(); // both addresses
    words.extend([0, 17, outer[24], outer[25]]); // protocol, length
    let mut sum: u32 = words
        .chunks(2)
        .map(|two| u32::from(u16::from_be_bytes([two[0], two[1]])))
        .sum();
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    let sum = u16::try_from(sum).unwrap();
    for (field, wanted) in [
        (sum, Outcome::Passed),
        (sum ^ 1, Outcome::Redirected(inner.clone())),
        (0, Outcome::Redirected(inner.clone())),
    ] {
        outer[26..28].copy_from_slice(&field.to_be_bytes());
        assert_eq!(
            both.bench.decapsulate(&frame(&outer)).unwrap(),
            wanted,
            "{field:#x}"
        );
    }
    // What is forged is refused all the same.
    outer[26..28].copy_from_slice(&sum.to_be_bytes());
    outer[28 + 12] = 10;
    both.bench.moved().unwrap();
    both.bench.decapsulate(&frame(&outer)).unwrap();
    assert_eq!(both.bench.moved().unwrap(), ["drop_spoofed_source"]);
}

#[test]
#[ignore = "needs root and BPF"]
fn after_the_lease_and_towards_hosts_without_flanctl_nothing_is_sent_from_the_kernel() {
    let mut both = Both::new(PeerCheck::Strict, PLAIN);
    let there = datagram_of(b"payload", [172, 17, 41, 5].into(), [172, 17, 7, 9].into(), 9);
    let back = datagram_of(b"payload", [172, 17, 7, 9].into(), [172, 17, 41, 5].into(), 9);
    let back = frame(&datagram_of(&back, [192, 0, 2, 12].into(), LOCAL, PORT));
    let outcome = |both: &mut Both, why: &str| {
        assert_eq!(both.bench.encapsulate(&there).unwrap(), Outcome::Passed);
        assert_eq!(both.bench.moved().unwrap(), [why]);
    };
    both.send(&there);
    let mut others = peers(PLAIN);
    others[0].direct = false;
    both.bench.path.replace_peers(&others).unwrap();
    outcome(&mut both, "pass_not_flanctl");
    assert!(matches!(
        both.bench.decapsulate(&back).unwrap(),
        Outcome::Redirected(_)
    ));

    both.bench.path.replace_peers(&peers(PLAIN)).unwrap();
    let ended = Settings {
        valid_until: 1,
        ..both.settings.clone()
    };
    both.bench.path.configure(&ended).unwrap();
    outcome(&mut both, "pass_expired");
    assert_eq!(both.bench.decapsulate(&back).unwrap(), Outcome::Passed);

    let elsewhere = Settings {
        uplinks: vec![],
        ..both.settings.clone()
    };
    both.bench.path.configure(&elsewhere).unwrap();
    outcome(&mut both, "pass_no_uplink");
    both.bench.path.configure(&both.settings.clone()).unwrap();
    both.send(&there);

    shell("ip link set eth0 mtu 1499");
    let mut long = there.clone();
    long.resize(1472, 7);
    long[2..4].copy_from_slice(&1472_u16.to_be_bytes());
    assert_eq!(both.bench.encapsulate(&long).unwrap(), Outcome::Passed);
    assert_eq!(both.bench.moved().unwrap(), ["pass_too_big"]);
    shell("ip link set eth0 mtu 1500");
    both.send(&long);

    both.bench.path.disable().unwrap();
    outcome(&mut both, "pass_expired");
    both.bench.path.replace_peers(&[]).unwrap();
    both.bench.path.configure(&both.settings.clone()).unwrap();
    outcome(&mut both, "pass_no_route");
}

#[test]
#[ignore = "needs root and BPF"]
fn the_probe_says_what_a_host_lacks() {
    let good = settings(PeerCheck::Strict);
    probe(&good, [192, 0, 2, 12].into()).unwrap();
    probe(&good, [203, 0, 113, 9].into()).unwrap();
    let nowhere = Settings {
        uplinks: vec![good.uplinks[0] + 1000],
        ..good.clone()
    };
    let why = probe(&nowhere, [192, 0, 2, 12].into()).unwrap_err().to_string();
    assert!(why.contains("pass_no_uplink"), "{why}");
    fs::write("/proc/sys/net/ipv4/ip_forward", "0").unwrap();
    let why = probe(&good, [192, 0, 2, 12].into()).unwrap_err().to_string();
    assert!(why.contains("pass_no_uplink"), "{why}");
}

#[test]
#[ignore = "needs root and BPF"]
fn pins_are_taken_over_if_they_are_ours_and_of_our_size() {
    let settings = settings(PeerCheck::Strict);
    let folder = std::path::PathBuf::from(format!("/tmp/flanctl-bpf-{}", std::process::id()));
    fs::create_dir(&folder).unwrap();
    // SAFETY: it only moves this thread.
    let moved = unsafe { libc::unshare(libc::CLONE_NEWNS) };
    assert_eq!(moved, 0);
    shell(&format!(
        "mount --make-rprivate / && mount -t bpf bpf {}",
        folder.display()
    ));
    let pins = folder.join("network");
    let network = settings.network;
    let mut first = KernelPath::load(&pins, network, 24).unwrap();
    assert!(!first.taken_over());
    first.configure(&settings).unwrap();
    first.replace_peers(&peers(PEERS.len())).unwrap();
    first.pin().unwrap();
    first.pin().unwrap();

    let mut second = KernelPath::load(&pins, network, 24).unwrap();
    assert!(second.taken_over());
    assert!(
        !second.replace_peers(&peers(PEERS.len())).unwrap(),
        "they are there already"
    );
    assert!(second.replace_peers(&peers(1)).unwrap());
    let third = KernelPath::load(&pins, network, 25).unwrap();
    assert!(!third.taken_over(), "other subnets, another array");
    drop(third);
    second.pin().unwrap();
    fs::remove_file(pins.join("peers")).unwrap();
    let mut fourth = KernelPath::load(&pins, network, 24).unwrap();
    assert!(!fourth.taken_over(), "one is missing");
    fourth.configure(&settings).unwrap();
    fourth.pin().unwrap();
    assert!(KernelPath::load(&pins, network, 24).unwrap().taken_over());
    let data = aya::maps::MapData::from_pin(pins.join("config")).unwrap();
    let mut map: aya::maps::Array<_, [u8; 96]> = aya::maps::Map::Array(data).try_into().unwrap();
    let mut config = map.get(&0, 0).unwrap();
    config[8] += 1; // the layout
    map.set(0, config, 0).unwrap();
    let mut other = KernelPath::load(&pins, network, 24).unwrap();
    assert!(!other.taken_over(), "another version's");
    other.configure(&settings).unwrap();
    other.pin().unwrap();
    assert!(KernelPath::load(&pins, network, 24).unwrap().taken_over());

    kernelpath::unpin(&pins).unwrap();
    kernelpath::unpin(&pins).unwrap();
    let why = KernelPath::load(&pins, (Ipv4Addr::new(10, 0, 0, 0), 8), 30).unwrap_err();
    assert!(why.to_string().contains("/30"), "{why}");
    shell(&format!("umount {}", folder.display()));
    fs::remove_dir(&folder).unwrap();
}

#[test]
#[ignore = "needs root and BPF"]
fn a_table_that_could_be_written_in_part_only_leaves_nothing_behind_in_the_next() {
    let settings = settings(PeerCheck::Strict);
    let mut bench = Bench::new(settings.network, 24).unwrap();
    bench.path.configure(&settings).unwrap();
    let mine = peers(PLAIN);
    bench.path.replace_peers(&mine).unwrap();
    // The map of peers has room for each of these tables and not for both at once.
    let table = |second: u8| -> Vec<Peer> {
        (0..3000_u32)
            .map(|number| Peer {
                base: Ipv4Addr::from_bits(0x0b00_0000 + number * 4),
                length: 30,
                address: Ipv4Addr::from_bits(u32::from_be_bytes([10, second, 0, 1]) + number),
                direct: true,
            })
            .chain(mine.iter().copied())
            .collect()
    };
    bench.path.replace_peers(&table(1)).unwrap();
    let refused = bench.path.replace_peers(&table(2)).unwrap_err();
    assert!(refused.to_string().contains("peers"), "{refused}");
    bench.path.replace_peers(&mine).unwrap();
    assert_eq!(bench.path.traffic().unwrap().len(), PLAIN);
    bench.path.replace_peers(&table(2)).unwrap();
    assert_eq!(bench.path.traffic().unwrap().len(), 3000 + PLAIN);
}

#[test]
#[ignore = "needs root and BPF"]
fn without_the_device_every_datagram_goes_to_the_socket_until_there_is_another() {
    let mut both = Both::new(PeerCheck::Strict, PLAIN);
    let inner = datagram_of(b"payload", [172, 17, 7, 9].into(), [172, 17, 41, 5].into(), 9);
    let frame = frame(&datagram_of(&inner, [192, 0, 2, 12].into(), LOCAL, PORT));
    assert_eq!(
        both.bench.decapsulate(&frame).unwrap(),
        Outcome::Redirected(inner.clone())
    );
    shell("ip link delete flannel0");
    assert_eq!(both.bench.decapsulate(&frame).unwrap(), Outcome::Passed);
    assert!(both.bench.path.configure(&both.settings).is_err(), "it is gone");
    shell("ip tuntap add flannel0 mode tun; ip link set flannel0 mtu 1472 up");
    both.settings.tun = index("flannel0");
    both.bench.path.configure(&both.settings).unwrap();
    assert_eq!(
        both.bench.decapsulate(&frame).unwrap(),
        Outcome::Redirected(inner)
    );
}
