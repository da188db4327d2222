#!/bin/sh
# Before removing (dpkg: `remove`; rpm: 0 versions left), not before upgrading. The agent is stopped; device, routes,
# rules and lease stay, so that packets can go on and another agent, or flanneld, finds what it needs.
set -e
case "$1" in
remove | 0)
    # Links to a program that goes would lead nowhere; what they replaced comes back.
    [ ! -e /var/lib/flanctl/install/ledger.json ] || flanctl uninstall --yes || true
    if command -v systemctl >/dev/null; then
        [ ! -d /run/systemd/system ] || systemctl stop flanctl-agent.service || true
        systemctl --quiet --no-reload disable flanctl-agent.service || true
    fi
    ;;
esac
