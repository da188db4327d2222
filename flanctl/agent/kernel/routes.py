"""Routes as wanted: desired against actual, ours told apart by protocol number.

    routes = Routes(kernel)
    report = routes.apply([device_route(link, IPv4Network("172.17.0.0/16"))])

Everything wanted, every time; what failed stays wanted, so the next `apply` tries it again. Routes of other
protocols are never changed or deleted. When somebody else's route has our destination and metric (dockerd started
with its default 172.17.0.1/16 before we came), ours is reported as failed and waits: taking theirs would cut
containers that work, and once theirs goes ours is added.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from flanctl.agent.kernel.model import ROUTE_PROTOCOL, Link, Route, RouteReport
from flanctl.errors import Conflict, FlanctlError

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from ipaddress import IPv4Network

    from flanctl.agent.kernel.door import Kernel


def device_route(link: Link, network: IPv4Network) -> Route:
    """`<network> dev flannel0 proto 102 scope link`: every packet of the network enters our device."""
    return Route(network, link=link.index, scope="link")


class Routes:
    """All routes of one protocol number in the main table."""

    def __init__(self, kernel: Kernel, *, protocol: int = ROUTE_PROTOCOL) -> None:
        self._kernel = kernel
        self._protocol = protocol

    def apply(self, wanted: Iterable[Route]) -> RouteReport:
        """Make the kernel have exactly these of our routes. NotPermitted and the like end up in `failed`.

        Raises FlanctlError only when the kernel would not list its routes.
        """
        desired = {(route.destination, route.metric): route for route in wanted}
        ours = {
            (route.destination, route.metric): route for route in self._kernel.routes(protocol=self._protocol)
        }
        if desired == ours:
            return RouteReport()
        names = {link.index: link.name for link in self._kernel.links()}
        repaired, failed = [], []
        for key, route in desired.items():
            found = ours.get(key)
            if found == route:
                continue
            try:
                if found is not None:
                    self._kernel.replace_route(route)
                    repaired.append(f"route {_words(found, names)} became {_words(route, names)}")
                else:
                    self._kernel.add_route(route)
                    repaired.append(f"route {_words(route, names)} was missing, added")
            except Conflict:
                theirs = [
                    other for other in self._kernel.routes() if (other.destination, other.metric) == key
                ]
                there = " and ".join(_words(other, names) for other in theirs) or "another one"
                failed.append(f"route {_words(route, names)}: there is {there} by somebody else")
            except FlanctlError as error:
                failed.append(str(error))
        missing = len(failed)
        for key, route in ours.items():
            if key in desired:
                continue
            try:
                self._kernel.delete_route(route)
                repaired.append(f"route {_words(route, names)} is not wanted, deleted")
            except FlanctlError as error:
                failed.append(str(error))
        return RouteReport(tuple(repaired), tuple(failed), missing)


def _words(route: Route, names: Mapping[int, str]) -> str:
    via = f" via {route.gateway}" if route.gateway else ""
    return f"{route.destination}{via} dev {names.get(route.link, route.link)}"
