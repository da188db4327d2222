/* SPDX-License-Identifier: GPL-2.0-only OR MIT
 *
 * What the programs in flannel.bpf.c and their loader (maps.rs) both know: the layout of the maps. Whoever changes it
 * changes LAYOUT too, so that an agent never takes over maps it would misread.
 */
#ifndef FLANNEL_H
#define FLANNEL_H

#include <linux/types.h>

#define LAYOUT 3

/* The only element of `config`. Addresses and ports are in network order where the type says so, else in the host's. */
struct config {
    __u64 valid_until; /* CLOCK_BOOTTIME, ns: after it everything goes to user space. 0: now */
    __u32 layout;
    __u32 tun; /* ifindex */
    __be32 local; /* the underlay address peers send to */
    __be16 port;
    __u16 mtu; /* the TUN's */
    __u32 peer_check;
    __u32 network, network_mask;
    __u32 own, own_mask;
    __u32 subnet_len;
    __u32 foreign; /* not 0: look into `foreign` too */
    __u32 uplinks[8]; /* ifindexes that packets may leave by; unused ones are 0 */
    /* The VXLAN-GPE device that receives for us, see by_stack. */
    __be16 rx_port; /* 0: there is none */
    __u16 rx_mark; /* what datagrams on their way there have as tc_index, which nobody outside can give them */
    __u32 rx_vni; /* and in their header, which nobody in a namespace of this host can know */
};

enum peer_check { CHECK_STRICT, CHECK_SUBNET, CHECK_OFF };

/* A peer as the values of `subnets` and `foreign` have it. One 64-bit store, so that no reader sees half of it. */
struct hop {
    __be32 address; /* the peer's public IP; 0: nobody */
    __u32 direct; /* not 0: it runs flanctl, packets may go to it from here */
};

/* What passed between us and one peer: the values of `peers`, one for each processor. */
struct traffic {
    __u64 out_packets, out_bytes;
    __u64 in_packets, in_bytes;
    __u64 drops; /* of what it sent */
    __u64 heard; /* CLOCK_BOOTTIME, ns, of the last packet of it that was accepted */
};

struct foreign_key {
    __u32 length; /* of the prefix */
    __be32 address;
};

struct foreign_hop {
    struct hop hop;
    __u32 length;
    __u32 pad;
};

struct count {
    __u64 packets, bytes;
};

/* Indexes of `counters`. From FIRST_DROP on packets were dropped, from FIRST_PASS on given to user space. */
enum event {
    SENT,
    RECEIVED,
    STACK_GIVEN, /* of those received: on the way through the stack to flannel0-rx */
    STACK_RETURNED, /* came out there; several given may be one, put together */
    FIRST_DROP,
    DROP_SHORT = FIRST_DROP,
    DROP_BAD_VERSION,
    DROP_BAD_LENGTH,
    DROP_UNKNOWN_SENDER,
    DROP_SPOOFED_SOURCE,
    DROP_FOREIGN_DESTINATION,
    DROP_SEND_ERROR,
    DROP_TUN_ERROR,
    FIRST_PASS,
    PASS_NO_ROUTE = FIRST_PASS,
    PASS_NOT_FLANCTL,
    PASS_TOO_BIG,
    PASS_NO_UPLINK,
    PASS_EXPIRED,
    PASS_OTHER,
    EVENTS,
};

#endif
