//! Hostile bytes through every door of the packet path, on stable Rust: seeds with names, mutations, and the properties of
//! each target after every one of them.
//!
//! `cargo test` runs the kept inputs and a second of mutations; `FLANCTL_FUZZ_SECONDS=600` (`make fuzz`) as long as it is
//! told. An input that shows a new behaviour is mutated on; with `FLANCTL_FUZZ_KEEP=1` it is written to
//! `tests/corpus/TARGET/` too. One that fails always is, as `failed-…`, and is run first from then on.

#![expect(clippy::unwrap_used, reason = "a test that panics has failed")]

use std::collections::HashSet;
use std::fs;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::net::Ipv4Addr;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::PathBuf;
use std::time::{Duration, Instant};

use dataplane::coalesce::{Coalescer, Kinds, MAX_SEGMENTS};
use dataplane::forward::{self, FromTun, PeerCheck, Rules};
use dataplane::group::{Groups, MAX_BYTES};
use dataplane::icmp;
use dataplane::packet::Ipv4Packet;
use dataplane::routes::{Route, Routes};
use dataplane::segment::{HEADER_ROOM, Segmenter};
use dataplane::sys::Part;
use dataplane::transport::Transport;
use dataplane::virtio::{self, Header, Task};
use etherparse::PacketBuilder;

const MTU: usize = 1472;
const PEER: Ipv4Addr = Ipv4Addr::new(10, 0, 0, 2);

/// What an input led to, as numbers: two inputs with the same ones are of a kind.
type Behaviour = Vec<u64>;

fn routes() -> Routes {
    let line = |third, last| {
        Route::new(
            Ipv4Addr::new(172, 17, third, 0),
            24,
            Ipv4Addr::new(10, 0, 0, last),
        )
        .unwrap()
    };
    Routes::new([line(7, 2), line(8, 3)]).unwrap()
}

fn rules(peer_check: PeerCheck) -> Rules {
    Rules {
        own: "172.17.41.1/24".parse().unwrap(),
        mtu: MTU,
        peer_check,
    }
}

// ---- targets --------------------------------------------------------------------------------------------------------

/// A virtio header and what follows it, as a TUN would give it: decided, cut, put into messages.
fn tun(input: &[u8]) -> Behaviour {
    let Some((header, bytes)) = input.split_first_chunk::<{ virtio::LEN }>() else {
        return vec![0];
    };
    let header = Header::parse(header);
    let Ok(packet) = Ipv4Packet::parse(bytes) else {
        return vec![1];
    };
    let Some(task) = header.task(packet) else {
        return vec![2];
    };
    let (routes, rules) = (routes(), rules(PeerCheck::Strict));
    let mut seen = vec![3];
    match forward::from_tun(packet, bytes.len(), &routes, &rules) {
        FromTun::Forward(peer) => {
            assert!(bytes.len() <= MTU);
            assert_eq!(routes.find(packet.destination()), Some(peer));
            seen.push(1);
        }
        FromTun::Reply(unreachable) => {
            let mut answer = [0; icmp::MAX_LEN];
            let length = unreachable.write(&mut answer);
            Ipv4Packet::parse(&answer[..length]).expect("what we write is a packet");
            seen.push(2);
        }
        FromTun::Drop(reason) => seen.push(10 + reason as u64),
    }
    match task {
        Task::Nothing => seen.push(100),
        Task::Checksum { start, field } => {
            assert!(start >= packet.header_len() && field + 2 <= bytes.len());
            let value = virtio::completed(bytes, start);
            let mut whole = bytes.to_vec();
            dataplane::checksum::store(&mut whole, field, value);
            seen.push(101);
        }
        Task::Segment { transport, size } => seen.extend(cut(bytes, transport, size)),
    }
    seen
}

fn cut(bytes: &[u8], transport: Transport, size: usize) -> Behaviour {
    let mut segmenter = Segmenter::new(bytes, 0, transport, size);
    let mut groups = Groups::new(64);
    let mut headers = vec![0; HEADER_ROOM];
    let (mut payload, mut count) = (Vec::new(), 0_usize);
    while let Some((length, part)) = segmenter.next(bytes, &mut headers) {
        let whole = [&headers[..length], part.of(bytes)].concat();
        let segment = Ipv4Packet::parse(&whole).expect("a segment is a packet");
        assert_eq!(
            segment.destination(),
            Ipv4Packet::parse(bytes).unwrap().destination()
        );
        let inner = Transport::of(segment).expect("with the same transport header");
        assert!(inner.checksum_holds(segment));
        payload.extend_from_slice(part.of(bytes));
        let head = Part {
            start: 0,
            len: length,
        };
        groups.push(PEER, Some(inner.flow(segment)), head, Some(part));
        count += 1;
    }
    assert_eq!(payload, &bytes[transport.end..], "no byte is lost or invented");
    groups.pack();
    let packets: usize = groups
        .messages()
        .iter()
        .map(|message| {
            let (bytes, packets) = groups.size(message);
            assert!(bytes <= MAX_BYTES.max(usize::from(message.segment_size)));
            packets
        })
        .sum();
    assert_eq!(packets, count);
    vec![
        102,
        u64::from(transport.protocol),
        u64::from(count.ilog2()),
        groups.messages().len().ilog2().into(),
    ]
}

/// The first byte says who sent it and how far it is believed, the rest is the datagram.
fn datagram(input: &[u8]) -> Behaviour {
    let Some((how, bytes)) = input.split_first() else {
        return vec![0];
    };
    let sender = Ipv4Addr::new(10, 0, 0, how & 3);
    let check = [PeerCheck::Strict, PeerCheck::Subnet, PeerCheck::Off][usize::from(how >> 2) % 3];
    let (routes, rules) = (routes(), rules(check));
    match forward::from_peer(bytes, sender, &routes, &rules) {
        Ok(delivery) => {
            let packet = delivery.packet();
            assert_eq!(packet.bytes(), bytes);
            assert!(rules.own.contains(packet.destination()), "only our own subnet");
            if check == PeerCheck::Strict {
                assert!(routes.is_peer(sender));
                assert!(packet.source() == sender || routes.find(packet.source()) == Some(sender));
            }
            assert!(bytes.len() <= MTU || delivery.header().is_some());
            if let Some(header) = delivery.header() {
                assert!(header.task(packet).is_some(), "the kernel would refuse it");
            }
            vec![
                1,
                u64::from(delivery.header().is_some()),
                u64::from(packet.protocol() % 32),
            ]
        }
        Err(reason) => vec![2, reason as u64, u64::from(how >> 2) % 3],
    }
}

/// A burst: lengths of two bytes and datagrams; merged for the TUN and cut again, it is the same burst.
fn burst(input: &[u8]) -> Behaviour {
    let mut buffer = Vec::new();
    let mut parts = Vec::new();
    let mut rest = input;
    while let Some((length, after)) = rest.split_first_chunk::<2>() {
        let length = usize::from(u16::from_be_bytes(*length)).min(after.len());
        parts.push(Part {
            start: buffer.len(),
            len: length,
        });
        buffer.extend_from_slice(&after[..length]);
        rest = &after[length..];
    }
    let mut coalescer = Coalescer::new(Kinds { tcp: true, udp: true });
    for part in &parts {
        coalescer.push(&buffer, *part);
    }
    let mut got: Vec<Vec<u8>> = Vec::new();
    let mut seen = vec![parts.len().min(8) as u64];
    let drained = coalescer.drain(&buffer, |output| {
        let bytes: Vec<u8> = output.pieces().flat_map(|piece| piece.to_vec()).collect();
        assert!(output.pieces().count() <= MAX_SEGMENTS + 1);
        seen.push(output.packets().min(4) as u64);
        if output.packets() == 1 {
            got.push(bytes);
            return Ok::<(), ()>(());
        }
        let packet = Ipv4Packet::parse(&bytes).expect("a run is a packet");
        let Some(Task::Segment { transport, size }) = output.header.task(packet) else {
            panic!("a run is to be cut")
        };
        let mut segmenter = Segmenter::new(&bytes, 0, transport, size);
        let mut header = [0; HEADER_ROOM];
        let mut segments = 0;
        while let Some((length, part)) = segmenter.next(&bytes, &mut header) {
            got.push([&header[..length], part.of(&bytes)].concat());
            segments += 1;
        }
        assert_eq!(segments, output.packets());
        let run = &got[got.len() - segments..];
        assert!(output.singly().map(normal).eq(run.iter().map(|one| normal(one))));
        Ok(())
    });
    drained.unwrap();
    assert_eq!(got.len(), parts.len(), "nothing lost, nothing invented");
    let wanted: Vec<Vec<u8>> = parts.iter().map(|part| normal(part.of(&buffer))).collect();
    let found: Vec<Vec<u8>> = got.iter().map(|one| normal(one)).collect();
    assert_eq!(
        by_flow(&found),
        by_flow(&wanted),
        "the same packets, each flow in its order"
    );
    // Few kinds: how many runs there were of one, of some, of many.
    let runs = |low, high| {
        seen[1..]
            .iter()
            .filter(|run| (low..high).contains(*run))
            .count()
            .min(3) as u64
    };
    vec![seen[0], runs(1, 2), runs(2, 4), runs(4, 5)]
}

/// Packets of a flow after each other, those of none at the end.
fn by_flow(packets: &[Vec<u8>]) -> Vec<&Vec<u8>> {
    let flow = |bytes: &[u8]| {
        let packet = Ipv4Packet::parse(bytes).ok()?;
        Some(Transport::of(packet)?.flow(packet).index())
    };
    let mut sorted: Vec<&Vec<u8>> = packets.iter().collect();
    sorted.sort_by_key(|bytes| flow(bytes).unwrap_or(usize::MAX));
    sorted
}

/// With DF the kernel numbers segments anew, and nothing may depend on it (RFC 6864); its header's checksum goes along.
fn normal(packet: &[u8]) -> Vec<u8> {
    let mut bytes = packet.to_vec();
    if bytes.len() >= 20 && bytes[6] & 0x40 != 0 {
        bytes[4..6].fill(0);
        bytes[10..12].fill(0);
    }
    bytes
}

// ---- seeds ----------------------------------------------------------------------------------------------------------

fn packet(tcp: bool, source: [u8; 4], destination: [u8; 4], sequence: u32, payload: &[u8]) -> Vec<u8> {
    let ip = PacketBuilder::ipv4(source, destination, 63);
    let mut bytes = Vec::new();
    if tcp {
        let header = ip.tcp(1234, 80, sequence, 500).ack(77);
        header.write(&mut bytes, payload).unwrap();
    } else {
        ip.udp(1234, 53).write(&mut bytes, payload).unwrap();
    }
    bytes
}

const INSIDE: [u8; 4] = [172, 17, 41, 5];
const OUTSIDE: [u8; 4] = [172, 17, 7, 9];

fn tun_seeds() -> Vec<Vec<u8>> {
    let mut seeds = Vec::new();
    for (tcp, destination, length) in [
        (true, OUTSIDE, 9000),
        (true, OUTSIDE, 100),
        (false, OUTSIDE, 3000),
        (false, [172, 17, 99, 9], 20),
    ] {
        let bytes = packet(tcp, INSIDE, destination, 1, &vec![7; length]);
        let transport = Transport::of(Ipv4Packet::parse(&bytes).unwrap()).unwrap();
        for header in [
            Header::default(),
            Header::needs_checksum(transport),
            Header::super_packet(transport, 1400),
            Header::super_packet(transport, u16::MAX),
            Header::super_packet(transport, 0),
        ] {
            seeds.push([&header.format()[..], &bytes].concat());
        }
    }
    seeds
}

fn datagram_seeds() -> Vec<Vec<u8>> {
    let mut seeds = Vec::new();
    for how in [2, 0x82, 3, 9, 6] {
        for (tcp, length) in [(true, 1000), (false, 10), (false, 1444), (true, 5000)] {
            seeds.push([&[how][..], &packet(tcp, OUTSIDE, INSIDE, 1, &vec![9; length])].concat());
        }
    }
    // Header lengths of 0 to 15 words, versions 0 to 15.
    for nibble in 0..16 {
        for first in [0x40 | nibble, nibble << 4 | 5] {
            let mut bytes = packet(false, OUTSIDE, INSIDE, 1, &[1; 60]);
            bytes[0] = first;
            seeds.push([&[2][..], &bytes].concat());
        }
    }
    seeds
}

fn burst_seeds() -> Vec<Vec<u8>> {
    let burst = |packets: Vec<Vec<u8>>| {
        let framed = packets
            .into_iter()
            .map(|bytes| [&(bytes.len() as u16).to_be_bytes()[..], &bytes].concat());
        framed.collect::<Vec<_>>().concat()
    };
    let tcp = |n: u32| packet(true, OUTSIDE, INSIDE, n * 100, &[n as u8; 100]);
    let udp = |n: u8| packet(false, OUTSIDE, INSIDE, 0, &[n; 100]);
    vec![
        burst((0..70).map(tcp).collect()),
        burst((0..20).map(udp).collect()),
        burst(
            (0..40)
                .map(|n| if n % 2 == 0 { tcp(n / 2) } else { udp(n as u8) })
                .collect(),
        ),
        burst(vec![vec![], vec![0x45], tcp(0), tcp(2), tcp(1)]),
    ]
}

// ---- the driver -----------------------------------------------------------------------------------------------------

/// xorshift64: the same inputs on every machine, for a given seed.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    fn below(&mut self, limit: usize) -> usize {
        (self.next() % limit.max(1) as u64) as usize
    }
}

/// Bytes, words and runs that break parsers.
fn mutate(input: &[u8], other: &[u8], random: &mut Random) -> Vec<u8> {
    let mut bytes = input.to_vec();
    for _ in 0..=random.below(4) {
        // Headers are at the front; most of what matters is there.
        let reach = if random.below(4) > 0 {
            bytes.len().min(80)
        } else {
            bytes.len()
        };
        let at = random.below(reach);
        match random.below(8) {
            0 if !bytes.is_empty() => bytes[at] ^= 1 << random.below(8),
            1 if !bytes.is_empty() => bytes[at] = random.next() as u8,
            2 if at + 2 <= bytes.len() => {
                let words = [0_u16, 1, 2, 7, 8, 19, 20, 0x3fff, 0x7fff, 0x8000, 0xfffe, 0xffff];
                let word = words[random.below(words.len())];
                bytes[at..at + 2].copy_from_slice(&word.to_be_bytes());
            }
            3 => bytes.truncate(random.below(bytes.len() + 1)),
            4 => bytes.extend((0..random.below(64)).map(|n| n as u8)),
            5 => {
                let from = random.below(other.len());
                let length = random.below(other.len() - from + 1).min(200);
                let end = (at + length).min(bytes.len());
                bytes.splice(at..end, other[from..from + length].iter().copied());
            }
            6 if at < bytes.len() => {
                bytes.remove(at);
            }
            _ => {
                let end = (at + random.below(8)).min(bytes.len());
                let run = bytes[at..end].to_vec();
                bytes.splice(at..at, run);
            }
        }
        bytes.truncate(65_535);
    }
    bytes
}

fn hash(value: &impl Hash) -> u64 {
    let mut hasher = DefaultHasher::new();
    value.hash(&mut hasher);
    hasher.finish()
}

fn fuzz(name: &str, target: fn(&[u8]) -> Behaviour, seeds: Vec<Vec<u8>>) {
    let folder = PathBuf::from(env!("CARGO_MANIFEST_DIR"))
        .join("tests/corpus")
        .join(name);
    let seconds = std::env::var("FLANCTL_FUZZ_SECONDS").map_or(1, |text| text.parse().expect("a number"));
    let keep = std::env::var_os("FLANCTL_FUZZ_KEEP").is_some();
    let mut kept: Vec<PathBuf> = fs::read_dir(&folder)
        .map(|entries| entries.map(|entry| entry.unwrap().path()).collect())
        .unwrap_or_default();
    kept.sort();
    let mut pool: Vec<Vec<u8>> = kept.iter().map(|path| fs::read(path).unwrap()).collect();
    pool.extend(seeds);

    let store = |kind: &str, input: &[u8]| {
        fs::create_dir_all(&folder).unwrap();
        let path = folder.join(format!("{kind}-{:016x}", hash(&input)));
        fs::write(&path, input).unwrap();
        path
    };
    let run = |input: &[u8]| match catch_unwind(AssertUnwindSafe(|| target(input))) {
        Ok(seen) => seen,
        Err(panic) => {
            let path = store("failed", input);
            eprintln!("{name}: the input is {}", path.display());
            std::panic::resume_unwind(panic);
        }
    };
    let mut known: HashSet<Behaviour> = pool.iter().map(|input| run(input)).collect();
    let mut random = Random(0x9e37_79b9_7f4a_7c15);
    let end = Instant::now() + Duration::from_secs(seconds);
    let mut count = 0_u64;
    while Instant::now() < end {
        let (one, other) = (random.below(pool.len()), random.below(pool.len()));
        let input = mutate(&pool[one], &pool[other], &mut random);
        count += 1;
        if known.insert(run(&input)) {
            if keep {
                store("kept", &input);
            }
            pool.push(input);
        }
    }
    eprintln!(
        "{name}: {count} inputs, {} behaviours, {} in the pool",
        known.len(),
        pool.len()
    );
}

#[test]
fn no_packet_from_the_tun_breaks_anything() {
    fuzz("tun", tun, tun_seeds());
}

#[test]
fn no_datagram_breaks_anything_or_goes_where_it_may_not() {
    fuzz("datagram", datagram, datagram_seeds());
}

#[test]
fn no_burst_loses_changes_or_reorders_a_packet() {
    fuzz("burst", burst, burst_seeds());
}
