#!/bin/sh
# After installing. dpkg says `configure [OLD-VERSION]`, rpm how many versions are there now. Nothing is enabled or
# started; an agent that runs is restarted into the new file and keeps its lease, device and rules.
set -e
case "$1 $2" in
configure\ ?* | 2*) upgraded=yes ;;
*) upgraded= ;;
esac
if [ -d /run/systemd/system ]; then
    systemctl daemon-reload || true
    [ -z "$upgraded" ] || systemctl try-restart flanctl-agent.service || true
fi
