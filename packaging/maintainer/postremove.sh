#!/bin/sh
# After removing. Only dpkg's `purge` asks for the host's memory of its subnet to go; rpm knows no such thing.
set -e
[ ! -d /run/systemd/system ] || systemctl daemon-reload || true
# What an uninstall could not put back is somebody's only copy.
if [ "$1" = purge ] && [ ! -e /var/lib/flanctl/install/ledger.json ]; then
    rm -rf /var/lib/flanctl
fi
