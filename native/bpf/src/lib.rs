//! The packet path of flannel's udp backend in the kernel: three TC programs (`flannel.bpf.c`) and what they look at.
//!
//! [`KernelPath`] loads them, takes over or makes their maps, fills these, and reads the counters. It attaches nothing:
//! whoever does that (over rtnetlink) gets the programs' descriptors from it. Where an object lives:
//!
//! | object | lives as long as |
//! | --- | --- |
//! | a program | the filter it hangs in, or this process |
//! | a map | a program that uses it, its pin in the BPF file system, or this process |
//!
//! So packets flow on when the agent is killed, and its successor finds peers and counters where they were.

mod layout;
mod table;

use std::fmt::{self, Display};
use std::net::Ipv4Addr;
use std::os::fd::{AsFd, BorrowedFd};
use std::path::{Path, PathBuf};
use std::time::Duration;
use std::{fs, io, thread};

use aya::maps::xdp::DevMap;
use aya::maps::{Array, MapInfo, PerCpuArray, PerCpuHashMap};
use aya::programs::{SchedClassifier, TestRun, TestRunOptions};
use aya::{Ebpf, EbpfLoader, include_bytes_aligned};

use layout::{
    Be32, Count, DROPS, EVENTS, FIRST_DROP, FOREIGN, Hop, LAYOUT, MAPS, PASSES, RECEIVED, SENT, STACK_GIVEN,
    STACK_RETURNED,
};
pub use layout::{Config, Traffic, UPLINKS};
pub use table::Peer;
use table::Table;

static OBJECT: &[u8] = include_bytes_aligned!(concat!(env!("OUT_DIR"), "/flannel.bpf.o"));

/// Names of the programs, as `tc filter show` and `bpftool prog` print them.
pub const ENCAP: &str = "flanctl_enc";
pub const DECAP: &str = "flanctl_dec";
/// What hangs on the device of [`Settings::rx_port`].
pub const RECEIVE: &str = "flanctl_rx";
const PROGRAMS: [&str; 3] = [ENCAP, DECAP, RECEIVE];

/// Most subnets a network may have for the array that is indexed by them: 8 MiB.
pub const MOST_SUBNETS: u32 = 1 << 20;

/// What was tried and what the kernel said.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Error(String);

impl Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for Error {}

/// `what` and every cause below, the verifier's log not among them.
fn error(what: impl Display, cause: &dyn std::error::Error) -> Error {
    let mut text = what.to_string();
    let mut next = Some(cause);
    while let Some(cause) = next {
        let words = cause.to_string();
        let words = words.lines().next().unwrap_or_default();
        if !text.ends_with(words) {
            text = format!("{text}: {words}");
        }
        next = cause.source();
    }
    Error(text)
}

/// How the path shall work; what the programs compare packets with.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Settings {
    /// Nanoseconds of `CLOCK_BOOTTIME` after which everything goes to user space: the end of our lease.
    pub valid_until: u64,
    /// Interface index of the TUN.
    pub tun: u32,
    /// The underlay address that peers send to.
    pub local: Ipv4Addr,
    pub port: u16,
    /// The TUN's.
    pub mtu: u16,
    /// 0 strict, 1 subnet, 2 off.
    pub peer_check: u32,
    /// Base address and prefix length.
    pub network: (Ipv4Addr, u8),
    pub own: (Ipv4Addr, u8),
    /// Interface indexes packets may leave by; `UPLINKS` at most.
    pub uplinks: Vec<u32>,
    /// UDP port of the VXLAN-GPE device that receives for us; 0: there is none.
    pub rx_port: u16,
}

/// The loaded programs and their maps.
#[derive(Debug)]
pub struct KernelPath {
    ebpf: Ebpf,
    pins: PathBuf,
    subnet_len: u8,
    network: (Ipv4Addr, u8),
    table: Table,
    config: Config,
    taken_over: bool,
    pinned: bool,
}

impl KernelPath {
    /// Loads our programs, onto the maps pinned in the directory `pins` where those fit, else onto new ones, which stay
    /// unpinned until [`pin`](Self::pin). Nothing is attached and no map in use is changed.
    pub fn load(pins: &Path, network: (Ipv4Addr, u8), subnet_len: u8) -> Result<Self, Error> {
        let slots = slots(network.1, subnet_len)?;
        let unfit = unfit(pins, slots);
        let taken_over = unfit.is_none();
        let mut loader = loader(slots);
        if taken_over {
            for (name, ..) in MAPS {
                loader.map_pin_path(name, pins.join(name));
            }
        }
        let mut ebpf = loader
            .load(OBJECT)
            .map_err(|cause| error("cannot load the TC programs", &cause))?;
        for name in PROGRAMS {
            classifier(&mut ebpf, name)?
                .load()
                .map_err(|cause| error(format!("the kernel does not take {name}"), &cause))?;
        }
        let mut path = Self {
            ebpf,
            pins: pins.to_owned(),
            subnet_len,
            network,
            table: Table::default(),
            config: Config::default(),
            taken_over,
            pinned: taken_over,
        };
        if taken_over {
            path.config = path
                .config_map()?
                .get(&0, 0)
                .map_err(|cause| error("config", &cause))?;
            path.table = Table::read(&path.ebpf)?;
        }
        Ok(path)
    }

    /// Whether the maps of an agent before us are in use, with its peers and counters.
    pub fn taken_over(&self) -> bool {
        self.taken_over
    }

    pub fn encap(&self) -> Result<BorrowedFd<'_>, Error> {
        self.program(ENCAP)
    }

    pub fn decap(&self) -> Result<BorrowedFd<'_>, Error> {
        self.program(DECAP)
    }

    pub fn receive(&self) -> Result<BorrowedFd<'_>, Error> {
        self.program(RECEIVE)
    }

    /// Pins the maps, in place of what was pinned before. After the programs are attached: a directory that holds maps
    /// nobody looks at would mislead the next agent.
    pub fn pin(&mut self) -> Result<(), Error> {
        if self.pinned && unfit(&self.pins, self.table_size()).is_none() {
            return Ok(());
        }
        unpin(&self.pins)?;
        fs::create_dir_all(&self.pins)
            .map_err(|cause| error(format!("cannot make {}", self.pins.display()), &cause))?;
        for (name, map) in self.ebpf.maps() {
            if MAPS.iter().any(|(ours, ..)| *ours == name) {
                let path = self.pins.join(name);
                map.pin(&path)
                    .map_err(|cause| error(format!("cannot pin {}", path.display()), &cause))?;
            }
        }
        self.pinned = true;
        Ok(())
    }

    /// What the programs compare packets with, from now on.
    ///
    /// The kernel copies the element byte by byte under its readers. What changes often may change like that; before
    /// anything else changes, the path is off for a moment, and user space carries what comes meanwhile.
    pub fn configure(&mut self, settings: &Settings) -> Result<(), Error> {
        let wanted = self.config_of(settings)?;
        // Also with the same index: the kernel has taken it out if the device was away.
        let device = self.ebpf.map_mut("device").ok_or_else(|| missing("device"))?;
        let mut map = DevMap::try_from(device).map_err(|cause| error("device", &cause))?;
        map.set(0, settings.tun, None, 0)
            .map_err(|cause| error("cannot write the map device", &cause))?;
        if wanted == self.config {
            return Ok(());
        }
        let before = self.config;
        let harmless = Config {
            valid_until: before.valid_until,
            uplinks: before.uplinks,
            foreign: before.foreign,
            rx_port: before.rx_port,
            ..wanted
        } == before;
        if !harmless && before.valid_until != 0 {
            self.write_config(Config {
                valid_until: 0,
                ..before
            })?;
            // A program runs for a microsecond and is not preempted for long.
            thread::sleep(Duration::from_millis(1));
        }
        self.write_config(wanted)
    }

    /// From now on everything goes to user space; what is attached stays.
    pub fn disable(&mut self) -> Result<(), Error> {
        self.write_config(Config {
            valid_until: 0,
            ..self.config
        })
    }

    /// The whole table of peers; only what differs is written, new ones first. False if nothing did. Where it fails, some
    /// of it may be written; the next call starts from what is.
    pub fn replace_peers(&mut self, peers: &[Peer]) -> Result<bool, Error> {
        let wanted = Table::of(peers, self.network, self.subnet_len)?;
        match self.write_peers(&wanted) {
            Ok(changed) => {
                self.table = wanted;
                Ok(changed)
            }
            Err(cause) => {
                self.table = Table::read(&self.ebpf)?;
                Err(cause)
            }
        }
    }

    fn write_peers(&mut self, wanted: &Table) -> Result<bool, Error> {
        let foreign = u32::from(!wanted.foreign.is_empty());
        let changed = wanted.add_over(&self.table, &mut self.ebpf)?;
        if foreign > self.config.foreign {
            self.write_config(Config {
                foreign,
                ..self.config
            })?;
        }
        let removed = wanted.remove_from(&self.table, &mut self.ebpf)?;
        if foreign < self.config.foreign {
            self.write_config(Config {
                foreign,
                ..self.config
            })?;
        }
        Ok(changed || removed)
    }

    /// Names and totals since the maps were made: packets and bytes by direction, those that took the way through the stack,
    /// then `drop_…`, then `pass_…`.
    pub fn counters(&self) -> Result<Vec<(String, u64)>, Error> {
        let map = self.ebpf.map("counters").ok_or_else(|| missing("counters"))?;
        let map: PerCpuArray<_, Count> = map.try_into().map_err(|cause| error("counters", &cause))?;
        let mut totals = [Count::default(); EVENTS as usize];
        for (event, total) in totals.iter_mut().enumerate() {
            let each = map
                .get(&(event as u32), 0)
                .map_err(|cause| error("cannot read the counters", &cause))?;
            for one in each.iter() {
                total.packets += one.packets;
                total.bytes += one.bytes;
            }
        }
        let (sent, received) = (totals[SENT as usize], totals[RECEIVED as usize]);
        let mut found = vec![
            ("out_packets".to_owned(), sent.packets),
            ("out_bytes".to_owned(), sent.bytes),
            ("in_packets".to_owned(), received.packets),
            ("in_bytes".to_owned(), received.bytes),
            ("stack_given".to_owned(), totals[STACK_GIVEN as usize].packets),
            (
                "stack_returned".to_owned(),
                totals[STACK_RETURNED as usize].packets,
            ),
        ];
        let names = DROPS
            .iter()
            .map(|name| format!("drop_{name}"))
            .chain(PASSES.iter().map(|name| format!("pass_{name}")));
        found.extend(names.zip(totals[FIRST_DROP as usize..].iter().map(|total| total.packets)));
        Ok(found)
    }

    /// Public IPs that packets go to from the kernel now.
    pub fn direct_peers(&self) -> Vec<Ipv4Addr> {
        self.table.direct()
    }

    /// What passed between us and each peer since it came into the table. The times are of `CLOCK_BOOTTIME`.
    pub fn traffic(&self) -> Result<Vec<(Ipv4Addr, Traffic)>, Error> {
        let map = self.ebpf.map("peers").ok_or_else(|| missing("peers"))?;
        let map: PerCpuHashMap<_, Be32, Traffic> = map.try_into().map_err(|cause| error("peers", &cause))?;
        let mut found = Vec::new();
        for key in map.keys() {
            let key = key.map_err(|cause| error("cannot read the peers", &cause))?;
            let Ok(each) = map.get(&key, 0) else {
                continue; // it went meanwhile
            };
            let mut total = Traffic::default();
            for one in each.iter() {
                total.out_packets += one.out_packets;
                total.out_bytes += one.out_bytes;
                total.in_packets += one.in_packets;
                total.in_bytes += one.in_bytes;
                total.drops += one.drops;
                total.heard = total.heard.max(one.heard);
            }
            found.push((Ipv4Addr::from_bits(u32::from_be(key.0)), total));
        }
        Ok(found)
    }

    fn table_size(&self) -> u32 {
        slots(self.network.1, self.subnet_len).unwrap_or(0)
    }

    fn program(&self, name: &str) -> Result<BorrowedFd<'_>, Error> {
        let program = self.ebpf.program(name).ok_or_else(|| missing(name))?;
        let fd = program.fd().map_err(|cause| error(name, &cause))?;
        Ok(fd.as_fd())
    }

    fn config_map(&mut self) -> Result<Array<&mut aya::maps::MapData, Config>, Error> {
        let map = self.ebpf.map_mut("config").ok_or_else(|| missing("config"))?;
        map.try_into().map_err(|cause| error("config", &cause))
    }

    fn write_config(&mut self, config: Config) -> Result<(), Error> {
        self.config_map()?
            .set(0, config, 0)
            .map_err(|cause| error("cannot write the map config", &cause))?;
        self.config = config;
        Ok(())
    }

    fn config_of(&self, settings: &Settings) -> Result<Config, Error> {
        if settings.uplinks.len() > UPLINKS {
            return Err(Error(format!(
                "{} uplinks are more than {UPLINKS}",
                settings.uplinks.len()
            )));
        }
        let mut uplinks = [0; UPLINKS];
        uplinks[..settings.uplinks.len()].copy_from_slice(&settings.uplinks);
        let (network, own) = (settings.network, settings.own);
        // For as long as the maps live: packets on their way would be refused by new ones.
        let (rx_mark, rx_vni) = match self.config.rx_mark {
            0 => secrets()?,
            mark => (mark, self.config.rx_vni),
        };
        Ok(Config {
            valid_until: settings.valid_until,
            layout: LAYOUT,
            tun: settings.tun,
            local: settings.local.into(),
            port: settings.port.into(),
            mtu: settings.mtu,
            peer_check: settings.peer_check,
            network: network.0.to_bits() & mask(network.1),
            network_mask: mask(network.1),
            own: own.0.to_bits() & mask(own.1),
            own_mask: mask(own.1),
            subnet_len: u32::from(self.subnet_len),
            foreign: self.config.foreign,
            uplinks,
            rx_port: settings.rx_port.into(),
            rx_mark,
            rx_vni,
        })
    }
}

/// Runs both programs over a packet of ours without a network and looks at every byte: does this kernel do what we think
/// it does? `settings` must name a TUN (for the look-up's input) and uplinks, `peer` an address beyond one of these.
/// Nothing that carries packets is touched.
pub fn probe(settings: &Settings, peer: Ipv4Addr) -> Result<(), Error> {
    let there = Ipv4Addr::from_bits(settings.own.0.to_bits() ^ (1 << (32 - u32::from(settings.own.1))));
    let subnet_len = settings.own.1;
    let mut bench = Bench::new(settings.network, subnet_len)?;
    let settings = Settings {
        valid_until: u64::MAX,
        ..settings.clone()
    };
    bench.path.configure(&settings)?;
    bench.path.replace_peers(&[Peer {
        base: there,
        length: subnet_len,
        address: peer,
        direct: true,
    }])?;
    let packet = sample(settings.own.0, there);
    let sent = bench.encapsulate(&packet)?;
    let Outcome::Redirected(datagram) = sent else {
        return Err(Error(format!(
            "a packet to {peer} is not sent by the kernel ({})",
            bench.why()?
        )));
    };
    expect(&datagram, &packet, &settings, peer)?;

    // The same packet as its receiver gets it: from `peer`, with the addresses of both ends exchanged.
    let back = sample(there, settings.own.0);
    let frame = frame(&datagram_of(&back, peer, settings.local, settings.port));
    match bench.decapsulate(&frame)? {
        Outcome::Redirected(inner) if inner == back => Ok(()),
        Outcome::Redirected(_) => Err(Error("the kernel strips a datagram to other bytes".to_owned())),
        _ => Err(Error(format!(
            "a datagram of {peer} is not delivered ({})",
            bench.why()?
        ))),
    }
}

/// What became of a packet in a test run.
#[derive(Debug, PartialEq, Eq)]
pub enum Outcome {
    /// Sent on, with these bytes from the IP header on.
    Redirected(Vec<u8>),
    /// Given to user space.
    Passed,
    Dropped,
}

/// Programs with maps of their own, for packets that go nowhere: the probe's and the tests'.
#[derive(Debug)]
pub struct Bench {
    pub path: KernelPath,
    before: Vec<(String, u64)>,
}

impl Bench {
    pub fn new(network: (Ipv4Addr, u8), subnet_len: u8) -> Result<Self, Error> {
        let mut ebpf = loader(slots(network.1, subnet_len)?)
            // BPF_PROG_TEST_RUN knows packets with an Ethernet header only.
            .override_global("mac_header", &(ETHERNET as u32), true)
            .load(OBJECT)
            .map_err(|cause| error("cannot load the TC programs", &cause))?;
        for name in PROGRAMS {
            classifier(&mut ebpf, name)?
                .load()
                .map_err(|cause| error(format!("the kernel does not take {name}"), &cause))?;
        }
        let path = KernelPath {
            ebpf,
            pins: PathBuf::new(),
            subnet_len,
            network,
            table: Table::default(),
            config: Config::default(),
            taken_over: false,
            pinned: false,
        };
        let before = path.counters()?;
        Ok(Self { path, before })
    }

    /// An inner packet through `flanctl_enc`.
    pub fn encapsulate(&mut self, packet: &[u8]) -> Result<Outcome, Error> {
        self.run(ENCAP, &frame(packet))
    }

    /// An Ethernet frame through `flanctl_dec`.
    pub fn decapsulate(&mut self, frame: &[u8]) -> Result<Outcome, Error> {
        self.run(DECAP, frame)
    }

    /// Names of the counters that moved in the last run.
    pub fn moved(&self) -> Result<Vec<String>, Error> {
        let now = self.path.counters()?;
        Ok(now
            .into_iter()
            .zip(&self.before)
            .filter(|(now, before)| now.1 != before.1)
            .map(|(now, _)| now.0)
            .collect())
    }

    fn why(&self) -> Result<String, Error> {
        Ok(self.moved()?.join(", "))
    }

    fn run(&mut self, name: &str, data: &[u8]) -> Result<Outcome, Error> {
        self.before = self.path.counters()?;
        let mut out = vec![0; data.len() + 256];
        let options = TestRunOptions {
            data_in: Some(data),
            data_out: Some(&mut out),
            ..TestRunOptions::new()
        };
        let done = classifier(&mut self.path.ebpf, name)?
            .test_run(options)
            .map_err(|cause| error(format!("cannot run {name} over a packet"), &cause))?;
        out.truncate(done.data_size_out as usize);
        match done.return_value.cast_signed() {
            TC_ACT_REDIRECT if out.len() >= ETHERNET => Ok(Outcome::Redirected(out.split_off(ETHERNET))),
            TC_ACT_UNSPEC => Ok(Outcome::Passed),
            TC_ACT_SHOT => Ok(Outcome::Dropped),
            other => Err(Error(format!("{name} answered {other}"))),
        }
    }
}

const TC_ACT_UNSPEC: i32 = -1;
const TC_ACT_SHOT: i32 = 2;
const TC_ACT_REDIRECT: i32 = 7;
const ETHERNET: usize = 14;
const OUTER: usize = 28;

/// An IPv4 packet with an Ethernet header before it, from nobody to everybody's loopback: the test run's device has no
/// address, so this is the one frame that counts as meant for it.
pub fn frame(packet: &[u8]) -> Vec<u8> {
    let mut frame = vec![0; 12];
    frame.extend([0x08, 0x00]);
    frame.extend(packet);
    frame
}

/// The datagram that carries `packet`, as our user-space path sends it; DF clear, and no UDP checksum.
pub fn datagram_of(packet: &[u8], from: Ipv4Addr, to: Ipv4Addr, port: u16) -> Vec<u8> {
    // Callers' packets are of one datagram's size.
    let total = (packet.len() + OUTER) as u16;
    let mut bytes = vec![0x45, 0];
    bytes.extend(total.to_be_bytes());
    bytes.extend([0, 0, 0, 0, 64, 17, 0, 0]);
    bytes.extend(from.octets());
    bytes.extend(to.octets());
    let sum = checksum(&bytes);
    bytes[10..12].copy_from_slice(&sum.to_be_bytes());
    bytes.extend(port.to_be_bytes());
    bytes.extend(port.to_be_bytes());
    bytes.extend((total - 20).to_be_bytes());
    bytes.extend([0, 0]);
    bytes.extend(packet);
    bytes
}

/// Is `datagram` what carries `packet` to `peer`? The identification is the kernel's to choose.
pub fn expect(datagram: &[u8], packet: &[u8], settings: &Settings, peer: Ipv4Addr) -> Result<(), Error> {
    let mut wanted = datagram_of(packet, settings.local, peer, settings.port);
    if datagram.len() >= 20 {
        wanted[4..6].copy_from_slice(&datagram[4..6]);
        wanted[10..12].fill(0);
        let sum = checksum(&wanted[..20]);
        wanted[10..12].copy_from_slice(&sum.to_be_bytes());
    }
    match wanted.iter().zip(datagram).position(|(a, b)| a != b) {
        None if wanted.len() == datagram.len() => Ok(()),
        None => Err(Error(format!(
            "the kernel makes a datagram of {} bytes where {} are right",
            datagram.len(),
            wanted.len()
        ))),
        Some(at) => Err(Error(format!("byte {at} of the kernel's datagram is wrong"))),
    }
}

/// A UDP packet of no port anybody uses.
fn sample(from: Ipv4Addr, to: Ipv4Addr) -> Vec<u8> {
    let payload = b"flanctl looks whether this kernel carries packets as it should";
    let mut packet = datagram_of(payload, from, to, 9);
    packet[0] = 0x45;
    packet
}

/// RFC 1071, for a header of an even number of bytes whose own field is 0.
fn checksum(header: &[u8]) -> u16 {
    let sum: u32 = header
        .chunks_exact(2)
        .map(|word| u32::from(u16::from_be_bytes([word[0], word[1]])))
        .sum();
    let sum = (sum & 0xffff) + (sum >> 16);
    !(((sum & 0xffff) + (sum >> 16)) as u16)
}

/// A mark that is not 0, and 24 bits.
fn secrets() -> Result<(u16, u32), Error> {
    let (mut mark, mut vni) = ([0_u8; 2], [0_u8; 4]);
    for bytes in [&mut mark[..], &mut vni[1..]] {
        // Not libc::getrandom: glibc has it since 2.25, the frozen file needs 2.17.
        // SAFETY: it writes at most as many bytes into ours as they are.
        let got = unsafe { libc::syscall(libc::SYS_getrandom, bytes.as_mut_ptr(), bytes.len(), 0) };
        if usize::try_from(got) != Ok(bytes.len()) {
            return Err(error("getrandom", &io::Error::last_os_error()));
        }
    }
    Ok((u16::from_ne_bytes(mark).max(1), u32::from_be_bytes(vni)))
}

fn mask(length: u8) -> u32 {
    u32::MAX.checked_shl(32 - u32::from(length.min(32))).unwrap_or(0)
}

/// How many subnets of this length the network has.
fn slots(network_len: u8, subnet_len: u8) -> Result<u32, Error> {
    let bits = subnet_len.checked_sub(network_len).filter(|_| subnet_len <= 32);
    bits.and_then(|bits| 1_u32.checked_shl(bits.into()))
        .filter(|slots| *slots <= MOST_SUBNETS)
        .ok_or_else(|| {
            Error(format!(
                "a /{network_len} network with /{subnet_len} subnets has more than {MOST_SUBNETS} of them"
            ))
        })
}

/// Entries of `peers`, which is also asked for those with subnets of foreign lengths.
fn most_peers(slots: u32) -> u32 {
    slots + FOREIGN
}

/// Before Linux 5.11 maps count against `RLIMIT_MEMLOCK`, 64 KiB as a rule. Where it may not be raised, making
/// them says so.
fn lift_memory_limit() {
    let unlimited = libc::rlimit {
        rlim_cur: libc::RLIM_INFINITY,
        rlim_max: libc::RLIM_INFINITY,
    };
    // SAFETY: it reads one struct of ours.
    unsafe { libc::setrlimit(libc::RLIMIT_MEMLOCK, &raw const unlimited) };
}

fn loader<'a>(slots: u32) -> EbpfLoader<'a> {
    lift_memory_limit();
    let mut loader = EbpfLoader::new();
    loader
        .map_max_entries("subnets", slots)
        .map_max_entries("foreign", FOREIGN)
        .map_max_entries("peers", most_peers(slots));
    loader
}

fn classifier<'a>(ebpf: &'a mut Ebpf, name: &str) -> Result<&'a mut SchedClassifier, Error> {
    let program = ebpf.program_mut(name).ok_or_else(|| missing(name))?;
    program.try_into().map_err(|cause| error(name, &cause))
}

fn missing(name: &str) -> Error {
    Error(format!("the object has no {name}"))
}

/// Why the maps pinned in this directory cannot be taken over; None if they can.
pub fn unfit(pins: &Path, slots: u32) -> Option<String> {
    for (name, key, value) in MAPS {
        let entries = match name {
            "config" | "device" => 1,
            "subnets" => slots,
            "foreign" => FOREIGN,
            "peers" => most_peers(slots),
            _ => EVENTS,
        };
        let path = pins.join(name);
        let info = match MapInfo::from_pin(&path) {
            Ok(info) => info,
            Err(cause) => return Some(error(path.display(), &cause).0),
        };
        let found = (info.key_size(), info.value_size(), info.max_entries());
        if found != (key as u32, value as u32, entries) {
            return Some(format!("{} is of another size", path.display()));
        }
    }
    let config = aya::maps::MapData::from_pin(pins.join("config"))
        .map_err(|cause| error("config", &cause))
        .and_then(|data| {
            let map: Array<_, Config> = aya::maps::Map::Array(data)
                .try_into()
                .map_err(|cause| error("config", &cause))?;
            map.get(&0, 0).map_err(|cause| error("config", &cause))
        });
    match config {
        Ok(config) if config.layout == LAYOUT => None,
        Ok(config) => Some(format!(
            "{} is of layout {}, not {LAYOUT}",
            pins.display(),
            config.layout
        )),
        Err(cause) => Some(cause.0),
    }
}

/// Removes the directory and every pin in it. Gone already is fine; what is attached goes on with its maps.
pub fn unpin(pins: &Path) -> Result<(), Error> {
    match fs::remove_dir_all(pins) {
        Err(cause) if cause.kind() != io::ErrorKind::NotFound => {
            Err(error(format!("cannot remove {}", pins.display()), &cause))
        }
        _ => Ok(()),
    }
}

/// Nobody: what an empty slot holds.
const NOBODY: Hop = Hop {
    address: layout::Be32(0),
    direct: 0,
};
