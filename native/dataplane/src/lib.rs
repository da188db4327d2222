//! The packet path of flannel's udp backend in user space.
//!
//! The wire is flannel's: a bare inner IPv4 packet as the payload of a UDP datagram, nothing before or after it.
//!
//! ```text
//!            TUN ──read──▶ forward::from_tun ──▶ Forward to a next hop ──sendmmsg──▶ UDP socket
//!             ▲                      └──▶ Reply (ICMP net unreachable), rate limited
//!             └──write── Forward ◀── forward::from_peer ◀──recvmmsg── UDP socket
//! ```
//!
//! | module | what it is |
//! | --- | --- |
//! | [`packet`], [`checksum`], [`icmp`] | checked views over bytes, Internet checksums, the one ICMP message we write |
//! | [`routes`] | the immutable table: longest prefix, direct index for the common prefix length |
//! | [`forward`] | the decision, pure: bytes and table in, `Forward`, `Reply` or `Drop(reason)` out |
//! | [`transport`] | the TCP or UDP header inside, and the state of its checksum |
//! | [`virtio`], [`segment`], [`coalesce`], [`group`] | what a network card would do: the TUN hands over super-packets (TSO, USO) and takes them, the socket takes groups of datagrams (`UDP_SEGMENT`) and hands them over (`UDP_GRO`) |
//! | [`offload`] | which of that this kernel can, and what was given up and why |
//! | [`counters`], [`traffic`] | what happened, by reason and by peer |
//! | [`sys`] | every `unsafe` and every system call std and rustix do not wrap |
//! | [`engine`] | the loop around it all: bounded bursts, both directions served in turn |
//!
//! Nothing here knows Python, logs, or touches the kernel's configuration.

pub mod checksum;
pub mod coalesce;
pub mod counters;
pub mod engine;
pub mod forward;
pub mod group;
pub mod icmp;
pub mod offload;
pub mod packet;
pub mod routes;
pub mod segment;
pub mod sys;
pub mod traffic;
pub mod transport;
pub mod virtio;

mod plane;

pub use plane::{DataPlane, Error, Settings};
