//! `flanctl._native`: a thin shell. Everything that decides lives in the crates `dataplane` and `kernelpath`.

use std::io;
use std::net::Ipv4Addr;
use std::os::fd::{AsRawFd, BorrowedFd, RawFd};
use std::path::PathBuf;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use dataplane::offload::Offload;
use dataplane::routes::Route;
use dataplane::{Error, Settings};
use pyo3::exceptions::{PyOSError, PyRuntimeError, PyValueError};
use pyo3::prelude::*;
use pyo3::types::PyDict;

/// The one place where our errors become Python's.
fn raise(error: Error) -> PyErr {
    match error {
        Error::Invalid(text) => PyValueError::new_err(text),
        Error::Os(what, error) => os_error(what, &error),
        Error::State(text) => PyRuntimeError::new_err(text),
    }
}

fn os_error(what: String, error: &io::Error) -> PyErr {
    // Two arguments make Python choose the subclass by errno.
    PyOSError::new_err((error.raw_os_error().unwrap_or(0), what))
}

fn borrow<'fd>(fd: RawFd, name: &str) -> PyResult<BorrowedFd<'fd>> {
    if fd < 0 {
        return Err(PyValueError::new_err(format!("{name} {fd} is negative")));
    }
    // SAFETY: the descriptor is not -1, and it is only used during the constructor's call, in which Python's caller
    // keeps it open; one that is closed all the same gives EBADF, never undefined behaviour of ours.
    Ok(unsafe { BorrowedFd::borrow_raw(fd) })
}

fn narrow<T: TryFrom<i64>>(value: i64, name: &str) -> PyResult<T> {
    T::try_from(value).map_err(|_| PyValueError::new_err(format!("{name} {value} is out of range")))
}

/// Seconds as Python has them. Python's own waits refuse negatives and NaN in the same way.
fn duration(seconds: f64) -> PyResult<Duration> {
    if seconds.is_infinite() && seconds > 0.0 {
        return Ok(Duration::MAX);
    }
    Duration::try_from_secs_f64(seconds)
        .map_err(|_| PyValueError::new_err(format!("timeout {seconds} s is no time")))
}

#[pyclass(frozen, module = "flanctl._native")]
struct DataPlane(dataplane::DataPlane);

#[pymethods]
impl DataPlane {
    #[new]
    #[pyo3(signature = (tun_fd, udp_fd, *, mtu, gateway, port, peer_check = "strict", offloads = "all"))]
    fn new(
        tun_fd: RawFd,
        udp_fd: RawFd,
        mtu: i64,
        gateway: &str,
        port: i64,
        peer_check: &str,
        offloads: &str,
    ) -> PyResult<Self> {
        let settings = Settings {
            mtu: narrow(mtu, "mtu")?,
            own: gateway
                .parse()
                .map_err(|text| PyValueError::new_err(format!("gateway {text}")))?,
            port: narrow(port, "port")?,
            peer_check: peer_check.parse().map_err(PyValueError::new_err::<String>)?,
            offloads: offloads.parse().map_err(PyValueError::new_err::<String>)?,
        };
        let (tun, udp) = (borrow(tun_fd, "tun_fd")?, borrow(udp_fd, "udp_fd")?);
        dataplane::DataPlane::new(tun, udp, settings)
            .map(Self)
            .map_err(raise)
    }

    fn start(&self, py: Python<'_>) -> PyResult<()> {
        py.detach(|| self.0.start()).map_err(raise)
    }

    #[expect(clippy::needless_pass_by_value, reason = "PyO3 makes it for this call")]
    fn replace_routes(&self, routes: Vec<(String, i64, String)>) -> PyResult<bool> {
        let routes: Result<Vec<Route>, String> = routes.iter().map(parse_route).collect();
        self.0
            .replace_routes(routes.map_err(PyValueError::new_err)?)
            .map_err(raise)
    }

    fn counters<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        let counters = PyDict::new(py);
        for (name, value) in self.0.counters().read() {
            counters.set_item(name, value)?;
        }
        Ok(counters)
    }

    fn peers<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        let peers = PyDict::new(py);
        for (peer, traffic) in self.0.peers() {
            let heard = traffic.heard.map(|heard| heard.elapsed().as_secs_f64());
            let counts = (
                traffic.out_packets,
                traffic.out_bytes,
                traffic.in_packets,
                traffic.in_bytes,
                traffic.drops,
                heard,
            );
            peers.set_item(peer.to_string(), counts)?;
        }
        Ok(peers)
    }

    fn offloads<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        let levels = PyDict::new(py);
        for offload in Offload::ALL {
            let level = self.0.offload(offload);
            levels.set_item(offload.name(), (level.on, level.why))?;
        }
        Ok(levels)
    }

    fn failure(&self) -> Option<String> {
        self.0.failure()
    }

    fn wait(&self, py: Python<'_>, timeout: f64) -> PyResult<bool> {
        let timeout = duration(timeout)?;
        Ok(py.detach(|| self.0.wait(timeout)))
    }

    #[pyo3(signature = (timeout = 5.0))]
    fn stop(&self, py: Python<'_>, timeout: f64) -> PyResult<bool> {
        let timeout = duration(timeout)?;
        Ok(py.detach(|| self.0.stop(timeout)))
    }
}

fn parse_route((base, prefix_len, peer): &(String, i64, String)) -> Result<Route, String> {
    let length =
        u8::try_from(*prefix_len).map_err(|_| format!("{base}/{prefix_len}: no such prefix length"))?;
    let address = |text: &str| -> Result<Ipv4Addr, String> {
        text.parse()
            .map_err(|_| format!("{base}/{prefix_len} to {peer}: {text:?} is not an IPv4 address"))
    };
    Route::new(address(base)?, length, address(peer)?)
}

/// One lock around it all: the agent's thread changes it, others only read counters.
#[pyclass(frozen, module = "flanctl._native")]
struct KernelPath(Mutex<kernelpath::KernelPath>);

#[expect(clippy::needless_pass_by_value, reason = "as map_err calls it")]
fn refused(error: kernelpath::Error) -> PyErr {
    PyRuntimeError::new_err(error.to_string())
}

fn subnet(text: &str, name: &str) -> PyResult<(Ipv4Addr, u8)> {
    let (address, length) = text.split_once('/').unwrap_or((text, ""));
    match (address.parse(), length.parse::<u8>()) {
        (Ok(address), Ok(length)) if length <= 32 => Ok((address, length)),
        _ => Err(PyValueError::new_err(format!("{name} {text:?} is no subnet"))),
    }
}

fn address(text: &str) -> PyResult<Ipv4Addr> {
    text.parse()
        .map_err(|_| PyValueError::new_err(format!("{text:?} is not an IPv4 address")))
}

/// What Python says about a kernel path, by keyword.
#[derive(FromPyObject)]
#[pyo3(from_item_all)]
struct Wanted {
    valid_until: u64,
    tun: u32,
    local: String,
    port: u16,
    mtu: u16,
    peer_check: String,
    network: String,
    own: String,
    uplinks: Vec<u32>,
    rx_port: u16,
}

impl Wanted {
    fn settings(self) -> PyResult<kernelpath::Settings> {
        let peer_check: dataplane::forward::PeerCheck =
            self.peer_check.parse().map_err(PyValueError::new_err::<String>)?;
        Ok(kernelpath::Settings {
            valid_until: self.valid_until,
            tun: self.tun,
            local: address(&self.local)?,
            port: self.port,
            mtu: self.mtu,
            peer_check: peer_check as u32,
            network: subnet(&self.network, "network")?,
            own: subnet(&self.own, "own")?,
            uplinks: self.uplinks,
            rx_port: self.rx_port,
        })
    }
}

impl KernelPath {
    fn lock(&self) -> MutexGuard<'_, kernelpath::KernelPath> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[pymethods]
impl KernelPath {
    #[new]
    #[pyo3(signature = (pins, *, network, subnet_len))]
    #[expect(clippy::needless_pass_by_value, reason = "PyO3 makes it for this call")]
    fn new(py: Python<'_>, pins: PathBuf, network: &str, subnet_len: u8) -> PyResult<Self> {
        let network = subnet(network, "network")?;
        let loaded = py.detach(|| kernelpath::KernelPath::load(&pins, network, subnet_len));
        Ok(Self(Mutex::new(loaded.map_err(refused)?)))
    }

    #[staticmethod]
    fn probe(py: Python<'_>, settings: Wanted, peer: &str) -> PyResult<()> {
        let (settings, peer) = (settings.settings()?, address(peer)?);
        py.detach(|| kernelpath::probe(&settings, peer)).map_err(refused)
    }

    fn direct_peers(&self) -> Vec<String> {
        let direct = self.lock().direct_peers();
        direct.iter().map(ToString::to_string).collect()
    }

    fn programs(&self) -> PyResult<(RawFd, RawFd, RawFd)> {
        let path = self.lock();
        let (encap, decap, receive) = (path.encap(), path.decap(), path.receive());
        let fd = |program: Result<BorrowedFd<'_>, kernelpath::Error>| {
            program.map_err(refused).map(|program| program.as_raw_fd())
        };
        Ok((fd(encap)?, fd(decap)?, fd(receive)?))
    }

    fn peers<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        let peers = PyDict::new(py);
        for (peer, traffic) in py.detach(|| self.lock().traffic()).map_err(refused)? {
            let heard = traffic.heard_ago().map(|ago| ago.as_secs_f64());
            let row = (
                traffic.out_packets,
                traffic.out_bytes,
                traffic.in_packets,
                traffic.in_bytes,
                traffic.drops,
                heard,
            );
            peers.set_item(peer.to_string(), row)?;
        }
        Ok(peers)
    }

    fn configure(&self, py: Python<'_>, settings: Wanted) -> PyResult<()> {
        let settings = settings.settings()?;
        py.detach(|| self.lock().configure(&settings)).map_err(refused)
    }

    fn disable(&self, py: Python<'_>) -> PyResult<()> {
        py.detach(|| self.lock().disable()).map_err(refused)
    }

    fn replace_peers(&self, py: Python<'_>, peers: Vec<(String, u8, String, bool)>) -> PyResult<bool> {
        let peers: PyResult<Vec<kernelpath::Peer>> = peers
            .into_iter()
            .map(|(base, length, public_ip, direct)| {
                Ok(kernelpath::Peer {
                    base: address(&base)?,
                    length,
                    address: address(&public_ip)?,
                    direct,
                })
            })
            .collect();
        let peers = peers?;
        py.detach(|| self.lock().replace_peers(&peers)).map_err(refused)
    }

    fn pin(&self, py: Python<'_>) -> PyResult<()> {
        py.detach(|| self.lock().pin()).map_err(refused)
    }

    fn counters<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        let counters = PyDict::new(py);
        for (name, value) in py.detach(|| self.lock().counters()).map_err(refused)? {
            counters.set_item(name, value)?;
        }
        Ok(counters)
    }
}

#[pymodule]
mod _native {
    use pyo3::prelude::*;

    #[pymodule_export]
    use super::{DataPlane, KernelPath};

    #[pymodule_init]
    fn init(module: &Bound<'_, PyModule>) -> PyResult<()> {
        module.setattr("version", env!("CARGO_PKG_VERSION"))?;
        // PyO3 makes one as it adds classes; the stub, which is the contract, has none.
        module.delattr("__all__")
    }
}
