"""From settings to a running agent: what `flanctl agent` and `flanneld` share."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from flanctl.agent.daemon import Agent, Options
from flanctl.agent.machine import Choice, look, refuse_choice, refuse_without_rights
from flanctl.agent.notify import Notify
from flanctl.clock import BootClock
from flanctl.errors import UsageError
from flanctl.registry.config import clean_prefix
from flanctl.registry.session import session

if TYPE_CHECKING:
    from flanctl.agent.log import Log
    from flanctl.settings import Settings

FIRST_ASK_SECONDS = 60.0


def start(settings: Settings, *, log: Log, check: bool = False, patient: bool = False) -> None:
    """Run the agent these settings describe to its end, or with `check` only look whether it could.

    `patient` is flanneld's way of starting (`Options.patient`). Raises UsageError for settings that mean nothing, and
    whatever ends the agent.
    """
    refuse_without_rights()
    options = _options(settings, clean_prefix(settings.text("prefix")), patient=patient)
    choice = Choice(
        iface=settings.items("iface"),
        iface_regex=settings.items("iface_regex"),
        iface_can_reach=settings.optional("iface_can_reach"),
        public_ip=settings.optional("public_ip"),
        peer_check=settings.choice("peer_check"),
        data_path=settings.choice("data_path"),
        offloads=settings.offloads("offloads"),
    )

    refuse_choice(choice)

    def say(sentence: str, warning: bool) -> None:
        (log.warn if warning else log.info)(sentence)

    notify = Notify()
    if not check:
        # Which of three members answers, and by which API, can take longer than a short TimeoutStartSec= allows.
        notify.waiting(f"asking the registry at {settings.shown('endpoints')}", seconds=FIRST_ASK_SECONDS)
    with session(settings, create=not check, patient=not check, say=say) as registry:
        daemon = Agent(
            options,
            store=registry.store,
            dialect=registry.wanted_dialect,
            look=partial(look, choice=choice),
            log=log,
            notify=notify,
            clock=BootClock(),
            stay=registry.stay,
            move=registry.move,
        )
        if check:
            daemon.check()
            log.info("nothing stands in the way")
        else:
            log.info(
                "settings",
                endpoints=f"{settings.shown('endpoints')} ({settings.source('endpoints')})",
                prefix=registry.prefix,
                iface=settings.optional("iface") or "default-route",
            )
            daemon.run()


def _options(settings: Settings, prefix: str, *, patient: bool) -> Options:
    subnet_file = Path(settings.path("subnet_file"))
    if subnet_file.is_dir():
        raise UsageError(f"--subnet-file {subnet_file} is a directory")
    return Options(
        prefix=prefix,
        subnet_file=subnet_file.absolute(),
        state_dir=Path(settings.path("state_dir")).absolute(),
        run_dir=Path(settings.path("run_dir")).absolute(),
        ip_masq=settings.switch("ip_masq"),
        forward_rules=settings.switch("iptables_forward_rules"),
        resync_seconds=settings.seconds("iptables_resync"),
        # flanneld 0.28 takes 1 to 1439 minutes of its fixed 24 h.
        renew_margin=settings.number("subnet_lease_renew_margin") * 60.0,
        patient=patient,
        lease_ttl=settings.seconds("lease_ttl"),
        healthz=_healthz(settings),
        certificates={
            role: path
            for role, name in (("client", "cert"), ("ca", "cacert"))
            if (path := settings.optional(name)) is not None
        },
        docker_accept=settings.choice("docker_accept") == "auto",
    )


def _healthz(settings: Settings) -> tuple[str, int] | None:
    address = settings.address("healthz_ip")
    port = settings.number("healthz_port")
    return (address, port) if port else None
