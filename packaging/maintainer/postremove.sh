#!/bin/sh
# After removing. Only dpkg's `purge` asks for the host's memory of its subnet to go; rpm knows no such thing.
set -e
[ ! -d /run/systemd/system ] || systemctl daemon-reload || true
if [ "$1" = purge ]; then
    rm -rf /var/lib/flanctl
fi
