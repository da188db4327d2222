"""`flanctl net`: the network's config, the one key everything else follows from."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from flanctl import streams
from flanctl.commands import output
from flanctl.commands.options import output_options, registry_options, settings, write_out
from flanctl.errors import Conflict, Invalid, NotFound, NotPermitted, UsageError
from flanctl.model.json_text import MAX_BYTES
from flanctl.model.network_config import NetworkConfig, compose_config

if TYPE_CHECKING:
    from flanctl.commands.session import Session
    from flanctl.registry.stores.store import Entry


@click.command()
@click.argument("source", metavar="[CONFIG.json|-]", required=False)
@click.option("--network", metavar="CIDR", help="Network of all hosts together, such as 172.17.0.0/16.")
@click.option(
    "--subnet-len",
    type=int,
    metavar="BITS",
    help="Prefix length of one host's subnet. Default: 24, longer in a small network.",
)
@click.option("--subnet-min", metavar="ADDRESS", help="First subnet handed out. Default: the second.")
@click.option("--subnet-max", metavar="ADDRESS", help="Last subnet handed out. Default: the last.")
@click.option(
    "--backend", metavar="TYPE[,K=V…]", help="How packets travel, such as udp or vxlan,VNI=7. Default: udp"
)
@click.option("--dry-run", is_flag=True, help="Check and compare, write nothing.")
@click.option("--force", is_flag=True, help="Replace a different config that is there.")
@registry_options
@output_options
def init(
    source: str | None,
    network: str | None,
    subnet_len: int | None,
    subnet_min: str | None,
    subnet_max: str | None,
    backend: str | None,
    dry_run: bool,
    force: bool,
) -> None:
    """Write the network's config, from options, a file or standard input (-).

    The same content again is fine. Different content is shown and refused without --force; the write happens only
    if the registry still holds what was shown.

    \b
    Examples:
      flanctl net init --network 172.17.0.0/16
      flanctl net init --network 10.5.0.0/16 --subnet-len 25 --backend vxlan,VNI=7
      echo '{"Network":"172.17.0.0/16"}' | flanctl net init -
    """
    from flanctl.commands.session import dialect_of, session
    from flanctl.registry.config import config_key

    options = (network, subnet_len, subnet_min, subnet_max, backend)
    if source is not None and any(option is not None for option in options):
        raise UsageError("a config file and options for its fields exclude each other")
    if source is not None:
        text, name = _read(source), "standard input" if source == "-" else source
    elif network is not None:
        kind, backend_options = _backend(backend)
        text = compose_config(
            network=network,
            subnet_len=subnet_len,
            subnet_min=subnet_min,
            subnet_max=subnet_max,
            backend=kind,
            backend_options=backend_options,
        ).encode()
        name = "options"
    else:
        raise UsageError(
            "nothing to write: no --network and no file",
            hint="flanctl net init --network 172.17.0.0/16",
        )
    # All that can be wrong with the config is known before the registry is asked, or made.
    chosen = settings()
    config = NetworkConfig.parse(text, dialect_of(chosen), name=name)
    for sentence in (*config.warnings, *_overlaps(config)):
        output.warning(sentence)
    with session(chosen, create=not dry_run) as registry:
        current = registry.store.get(config_key(registry.prefix))
        if registry.dialect is not config.dialect:  # the registry is etcd v2, as its first answer told
            config = NetworkConfig.parse(text, registry.dialect, name=name)
        _write(registry, config, text.strip(), current, dry_run=dry_run, force=force)


def _write(
    registry: Session,
    config: NetworkConfig,
    text: bytes,
    current: Entry | None,
    *,
    dry_run: bool,
    force: bool,
) -> None:
    from flanctl.registry.config import config_key, write_config
    from flanctl.registry.stores.store import Changed, KeyExists

    key = config_key(registry.prefix)
    if current is not None and _same(current.value, text):
        _show(key, current.value, config, revision=current.revision, wrote=False)
        output.note(f"{key} holds this already, nothing written")
        return
    if current is not None:
        for line in _difference(current.value, text):
            output.note(line)
        orphans = _orphans(registry, config)
        for line in orphans:
            output.note(line)
        if not force:
            raise Conflict(
                f"{key} holds a different config, nothing written",
                details=(f"{len(orphans)} live leases would be outside it",) if orphans else (),
                hint="the same with --force, if every host may change to it",
                id="config-differs",
            )
    if dry_run:
        _show(key, text, config, revision=None, wrote=False)
        output.note(f"would write {key} (--dry-run)")
        return
    try:
        entry = write_config(registry.store, registry.prefix, text, expected=current)
    except (KeyExists, Changed) as error:
        raise Conflict(
            f"{key} was changed by somebody else just now, nothing written",
            details=(f"it holds {error.current.value.decode(errors='replace')}",)
            if error.current
            else ("it is gone",),
            hint="look at it with flanctl net get, then repeat",
            id="config-changed",
        ) from None
    _show(key, text, config, revision=entry.revision, wrote=True)
    output.note(f"wrote {key} at revision {entry.revision} ({registry.store.describe()})")


def _show(key: str, value: bytes, config: NetworkConfig, *, revision: int | None, wrote: bool) -> None:
    text = value.decode(errors="replace")
    form = write_out()
    if form == "json":
        output.json(
            {
                "key": key,
                "wrote": wrote,
                "revision": revision,
                "config": json.loads(text),
                "effective": config.effective(),
                "capacity": config.capacity,
            }
        )
    elif form == "simple":
        output.simple([(key, text)])
    else:
        output.pairs([("KEY", key), ("VALUE", text), *_facts(config)])


def _facts(config: NetworkConfig) -> list[tuple[str, object]]:
    options = "".join(f" {name}={json.dumps(value)}" for name, value in config.backend_options.items())
    return [
        ("NETWORK", config.network),
        (
            "SUBNETS",
            f"/{config.subnet_len} from {config.subnet_min} to {config.subnet_max}, {config.capacity} in all",
        ),
        ("BACKEND", f"{config.backend_type}{options}"),
    ]


def _same(stored: bytes, wanted: bytes) -> bool:
    """Equal as JSON: blanks and key order make no other network."""
    try:
        return stored == wanted or _canonical(stored) == _canonical(wanted)
    except (ValueError, RecursionError):
        return False


def _canonical(value: bytes) -> str:
    return json.dumps(json.loads(value), sort_keys=True)


def _difference(stored: bytes, wanted: bytes) -> list[str]:
    from difflib import unified_diff

    def lines(value: bytes) -> list[str]:
        try:
            return json.dumps(json.loads(value), indent=2, ensure_ascii=False).splitlines()
        except (ValueError, RecursionError):
            return value.decode(errors="backslashreplace").splitlines()

    return list(unified_diff(lines(stored), lines(wanted), "in the registry", "to be written", lineterm=""))


def _orphans(registry: Session, config: NetworkConfig) -> list[str]:
    """A line for each live lease that the new config has no place for."""
    return [
        f"lease {lease.subnet} of {lease.attributes.public_ip} does not fit the new config"
        for lease in registry.leases().table().leases
        if not config.accepts(lease.subnet)
    ]


def _overlaps(config: NetworkConfig) -> list[str]:
    from flanctl.agent.kernel.addresses import local_addresses

    return [
        f"the network {config.network} covers this host's own address {address}"
        for address in sorted(local_addresses())
        if address in config.network and not address.is_loopback
    ]


def _backend(text: str | None) -> tuple[str | None, dict[str, object]]:
    """`vxlan,VNI=7,DirectRouting=true` → type and options, as texts: the config knows what each must be."""
    if text is None:
        return None, {}
    kind, *rest = text.split(",")
    options: dict[str, object] = {}
    for part in rest:
        name, equals, value = part.partition("=")
        if not name or not equals:
            raise UsageError(f'--backend: "{part}" is not KEY=VALUE')
        options[name] = value
    return kind.strip(), options


def _read(source: str) -> bytes:
    """The whole input, at most MAX_BYTES. Raises NotFound, NotPermitted, Invalid with the file's name."""
    try:
        if source == "-":
            content = sys.stdin.buffer.read(MAX_BYTES + 1)
        else:
            with Path(source).open("rb") as file:
                content = file.read(MAX_BYTES + 1)
    except FileNotFoundError:
        raise NotFound(f"no such file: {source}") from None
    except IsADirectoryError:
        raise Invalid(f"{source} is a directory, not a config file") from None
    except PermissionError:
        raise NotPermitted(f"no right to read {source}") from None
    except OSError as error:
        raise Invalid(f"cannot read {source}: {error.strerror}") from None
    if len(content) > MAX_BYTES:
        raise Invalid(f"{source} is larger than {MAX_BYTES} bytes, no network config is")
    return content


@click.command()
@click.option("--effective", is_flag=True, help="With defaults filled in, subnet range and capacity.")
@registry_options
@output_options
def get(effective: bool) -> None:
    """Print the stored config byte for byte, or what it means.

    \b
    Examples:
      flanctl net get
      flanctl net get --effective
    """
    from flanctl.commands.session import session
    from flanctl.registry.config import config_key, no_config

    with session() as registry:
        key = config_key(registry.prefix)
        entry = registry.store.get(key)
        if entry is None:
            raise no_config(registry.prefix)
        if not effective and write_out() != "json":
            _print_bytes(entry)
            return
        config = NetworkConfig.parse(entry.value, registry.dialect, name=key, strict=False)
    _print_config(config, {"key": key, "revision": entry.revision, "config": json.loads(entry.value)})


def _print_bytes(entry: Entry) -> None:
    """Exactly what is stored, with a line end if it lacks one; undecodable bytes pass through."""
    out = streams.out()
    out.flush()
    out.buffer.write(entry.value if entry.value.endswith(b"\n") else entry.value + b"\n")


def _print_config(config: NetworkConfig, more: dict[str, object]) -> None:
    form = write_out()
    if form == "json":
        output.json(
            {
                **more,
                "effective": config.effective(),
                "capacity": config.capacity,
                "warnings": list(config.warnings),
            }
        )
    elif form == "simple":
        output.simple(
            [
                (
                    config.network,
                    config.subnet_len,
                    config.subnet_min,
                    config.subnet_max,
                    config.backend_type,
                    config.capacity,
                )
            ]
        )
    else:
        output.pairs(_facts(config))


@click.command()
@click.argument("source", metavar="[FILE|-]", required=False)
@registry_options
@output_options
def validate(source: str | None) -> None:
    """Check a config, from a file, standard input (-) or, without either, the one in the registry.

    \b
    Examples:
      flanctl net validate net.json
      echo '{"Network":"10.0.0.0/8"}' | flanctl net validate --dialect 0.7 -
    """
    from flanctl.commands.session import dialect_of

    if source is None:
        from flanctl.commands.session import session
        from flanctl.registry.config import config_key, no_config

        with session() as registry:
            entry = registry.store.get(config_key(registry.prefix))
            if entry is None:
                raise no_config(registry.prefix)
            config = NetworkConfig.parse(entry.value, registry.dialect, name=entry.key)
    else:
        name = "standard input" if source == "-" else source
        config = NetworkConfig.parse(_read(source), dialect_of(settings()), name=name)
    for sentence in config.warnings:
        output.warning(sentence)
    _print_config(config, {"valid": True, "dialect": str(config.dialect)})
