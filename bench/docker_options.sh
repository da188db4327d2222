#!/bin/sh
# What flannel's mk-docker-opts.sh costs a shell, for comparison: the same steps (source the file, make three options, list the
# variables through set, grep and cut, write line by line), in words of our own. Measured under dash.
usage=no individual=yes combined=yes key=DOCKER_OPTS from=/run/flannel/subnet.env to=/run/docker_opts.env
while getopts "f:d:k:" option; do
    case $option in
    f) from=$OPTARG ;;
    d) to=$OPTARG ;;
    k) key=$OPTARG ;;
    *) usage=yes ;;
    esac
done
[ $usage = no ] || exit 1
[ -f "$from" ] && . "$from"
[ -n "$FLANNEL_SUBNET" ] && DOCKER_OPT_BIP="--bip=$FLANNEL_SUBNET"
[ -n "$FLANNEL_MTU" ] && DOCKER_OPT_MTU="--mtu=$FLANNEL_MTU"
if [ "$FLANNEL_IPMASQ" = true ]; then DOCKER_OPT_IPMASQ="--ip-masq=false"; else DOCKER_OPT_IPMASQ="--ip-masq=true"; fi
all=$(eval echo "\$$key")
mkdir -p "$(dirname "$to")"
printf '' >"$to"
for name in $(set | grep DOCKER_OPT_ | cut -d= -f1); do
    value=$(eval echo "\$$name")
    [ $individual = yes ] && echo "$name=\"$value\"" >>"$to"
    all="$all $value"
done
[ $combined = yes ] && echo "$key=\"$all\"" >>"$to"
