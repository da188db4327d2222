// SPDX-License-Identifier: GPL-2.0-only OR MIT
/*
 * flannel's udp wire format in the kernel: a bare inner IPv4 packet as the payload of a UDP datagram.
 *
 *   routing -> flannel0 egress:  flanctl_enc -> redirect_neigh -> uplink -> wire
 *   wire -> uplink ingress:      flanctl_dec -> redirect       -> flannel0 ingress -> routing
 *                                            -> IP, UDP, VXLAN-GPE -> flannel0-rx ingress: flanctl_rx -> flannel0 ingress
 *
 * Whatever a program does not want goes on as if it were not there (TC_ACT_UNSPEC, so that other programs on the hook
 * are called too): over the TUN or the UDP socket to the user-space path, which always runs and decides the same by
 * the same rules (native/dataplane/src/forward.rs). Dropped and counted here is only what that path would drop.
 *
 * bpf_fib_lookup asks the kernel's own tables for each packet, so routes, next hops, uplinks and path MTUs need no
 * copy in a map and no watching. bpf_redirect_neigh resolves the next hop and keeps its neighbour entry fresh.
 *
 * Needs Linux 5.10 (bpf_redirect_neigh with a next hop).
 */
#include <linux/bpf.h>
#include <linux/if_ether.h>
#include <linux/in.h>
#include <linux/ip.h>
#include <linux/pkt_cls.h>
#include <linux/udp.h>
#include <stdbool.h>
#include <stddef.h>

#include <bpf/bpf_endian.h>
#include <bpf/bpf_helpers.h>

#include "flannel.h"

#define AF_INET 2 /* sys/socket.h is the C library's */
#define PACKET_HOST 0 /* linux/if_packet.h, which drags in too much */
#define TTL 64
#define FRAGMENT 0x3fff /* MF and the offset, RFC 791 */
#define TCP_FIN_SYN_RST 7 /* RFC 9293, section 3.1 */

/* Bytes before the IP header where flanctl_enc runs. A TUN has none; BPF_PROG_TEST_RUN knows Ethernet only, so the probe
 * and the tests load the program with 14. */
const volatile __u32 mac_header = 0;

struct outer {
    struct iphdr ip;
    struct udphdr udp;
};

/* VXLAN-GPE (draft-ietf-nvo3-vxlan-gpe): no Ethernet between it and the inner packet. */
struct gpe {
    __u8 flags; /* a VNI and a next protocol are there */
    __u8 reserved[2];
    __u8 next_protocol; /* 1: IPv4 */
    __be32 vni; /* in the upper three bytes */
};

enum {
    FRAME = ETH_HLEN + sizeof(struct outer), /* where the inner packet begins on an Ethernet link */
    INNER = sizeof(struct iphdr),
};

struct {
    __uint(type, BPF_MAP_TYPE_ARRAY);
    __type(key, __u32);
    __type(value, struct config);
    __uint(max_entries, 1);
} config SEC(".maps");

/* By subnet number: (address - network) >> (32 - subnet_len). The loader sets the size. */
struct {
    __uint(type, BPF_MAP_TYPE_ARRAY);
    __type(key, __u32);
    __type(value, struct hop);
    __uint(max_entries, 1);
} subnets SEC(".maps");

/* Subnets of another length than the network's. */
struct {
    __uint(type, BPF_MAP_TYPE_LPM_TRIE);
    __type(key, struct foreign_key);
    __type(value, struct foreign_hop);
    __uint(max_entries, 4096);
    __uint(map_flags, BPF_F_NO_PREALLOC);
} foreign SEC(".maps");

/* By public IP. The loader sets the size. */
struct {
    __uint(type, BPF_MAP_TYPE_PERCPU_HASH);
    __type(key, __be32);
    __type(value, struct traffic);
    __uint(max_entries, 1);
    __uint(map_flags, BPF_F_NO_PREALLOC);
} peers SEC(".maps");

struct {
    __uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
    __type(key, __u32);
    __type(value, struct count);
    __uint(max_entries, EVENTS);
} counters SEC(".maps");

/* flannel0, for as long as it is there: the kernel itself takes a device out of such a map when it goes. Redirected to an index
 * that is nobody's any more, packets would be lost, where a flanneld may have come in our place. */
struct {
    __uint(type, BPF_MAP_TYPE_DEVMAP);
    __type(key, __u32);
    __type(value, struct bpf_devmap_val);
    __uint(max_entries, 1);
} device SEC(".maps");

static __always_inline void count(__u32 event, __u64 packets, __u64 bytes) {
    struct count *c = bpf_map_lookup_elem(&counters, &event);
    if (c) {
        c->packets += packets;
        c->bytes += bytes;
    }
}

static __always_inline int drop(__u32 why) {
    count(why, 1, 0);
    return TC_ACT_SHOT;
}

/* Not ours to decide: on to the user-space path. */
static __always_inline int pass(__u32 why) {
    count(why, 1, 0);
    return TC_ACT_UNSPEC;
}

/* The first `bytes` can be read directly. Pointers into the packet are void afterwards. */
static __always_inline bool readable(struct __sk_buff *skb, __u32 bytes) {
    if (skb->data + bytes <= skb->data_end)
        return true;
    return skb->len >= bytes && bpf_skb_pull_data(skb, bytes) == 0;
}

/* Who has this address: the longest prefix wins. The address of nobody is 0. */
static __always_inline struct hop find(const struct config *c, __be32 address) {
    struct hop nobody = {};
    __u32 at = bpf_ntohl(address);
    struct foreign_hop *f = NULL;
    if (c->foreign) {
        struct foreign_key key = {.length = 32, .address = address};
        f = bpf_map_lookup_elem(&foreign, &key);
        if (f && f->length > c->subnet_len)
            return f->hop;
    }
    if ((at & c->network_mask) == c->network) {
        __u32 number = (at - c->network) >> ((32 - c->subnet_len) & 31);
        struct hop *h = bpf_map_lookup_elem(&subnets, &number);
        if (h && h->address)
            return *h;
    }
    return f ? f->hop : nobody;
}

static __always_inline struct traffic *peer_at(__be32 address) {
    return bpf_map_lookup_elem(&peers, &address);
}

/* What this peer sent is refused. */
static __always_inline int refuse(struct traffic *peer, __u32 why) {
    if (peer)
        peer->drops++;
    return drop(why);
}

static __always_inline bool is_own(const struct config *c, __be32 address) {
    return (bpf_ntohl(address) & c->own_mask) == c->own;
}

/* Multicast, limited broadcast and the reserved class E: never a container. */
static __always_inline bool is_group(__be32 address) {
    return bpf_ntohl(address) >> 29 == 7;
}

/* Packets that `length` bytes of inner packet are on the wire. */
static __always_inline __u32 segments(__u32 length, __u32 headers, __u32 gso_size) {
    return !gso_size || length <= headers ? 1 : (length - headers + gso_size - 1) / gso_size;
}

/* Bytes of the IP and TCP headers of a GSO packet whose IP header is `ihl` words long and begins at `at`; 0: another
 * protocol. UDP's packets (UDP_SEGMENT) are left to user space: over a virtual wire they arrive whole, a receiver cannot
 * take the mark of a tunnel off them, and the kernel would then cut them at the wrong header (net/ipv4/udp_offload.c). */
static __always_inline __u32 headers(struct __sk_buff *skb, __u32 at, __u32 ihl, __u8 protocol) {
    __u8 offset = 0;
    if (protocol != IPPROTO_TCP || bpf_skb_load_bytes(skb, at + ihl * 4 + 12, &offset, 1))
        return 0;
    return ihl * 4 + (offset >> 4) * 4;
}

static __always_inline bool is_uplink(const struct config *c, __u32 link) {
#pragma unroll
    for (int i = 0; i < 8; i++)
        if (c->uplinks[i] == link)
            return link != 0;
    return false;
}

static __always_inline __u16 header_checksum(const struct iphdr *ip) {
    const __u16 *words = (const __u16 *)ip;
    __u32 sum = 0;
#pragma unroll
    for (int i = 0; i < 10; i++)
        sum += words[i];
    sum = (sum & 0xffff) + (sum >> 16);
    sum = (sum & 0xffff) + (sum >> 16);
    return ~sum;
}

/* Whether the outer checksum is still to be made, as over a virtual wire from a socket: the field has the sum of the
 * pseudo-header (RFC 768). Where it should be made stays noted in the packet when the header is gone, and whoever then has
 * to make checksums (fragmenting, a link without that offload) drops it. A finished one looks so once in 65,535 times, and
 * loses nothing by it. */
static __always_inline bool unfinished(const struct outer *outer) {
    if (!outer->udp.check)
        return false;
    __u32 sum = (outer->ip.saddr & 0xffff) + (outer->ip.saddr >> 16) + (outer->ip.daddr & 0xffff) +
                (outer->ip.daddr >> 16) + bpf_htons(IPPROTO_UDP) + outer->udp.len;
    sum = (sum & 0xffff) + (sum >> 16);
    sum = (sum & 0xffff) + (sum >> 16);
    return outer->udp.check == sum;
}

SEC("classifier") int flanctl_enc(struct __sk_buff *skb) {
    __u32 zero = 0, length = skb->len - mac_header, gso_size = skb->gso_size, all = 0, unit = length;
    struct config *c = bpf_map_lookup_elem(&config, &zero);
    if (!c || skb->protocol != bpf_htons(ETH_P_IP) || !readable(skb, mac_header + INNER))
        return TC_ACT_UNSPEC;
    struct iphdr *ip = (void *)(long)skb->data + mac_header;
    if ((void *)(ip + 1) > (void *)(long)skb->data_end)
        return TC_ACT_UNSPEC;
    if (ip->version != 4 || ip->ihl < 5 || ip->ihl * 4u > length || bpf_ntohs(ip->tot_len) != length)
        return pass(PASS_OTHER); /* also a BIG TCP packet, whose length field is 0 */
    if (bpf_ktime_get_boot_ns() >= c->valid_until)
        return pass(PASS_EXPIRED);
    __be32 destination = ip->daddr;
    if (is_own(c, destination) || is_group(destination))
        return pass(PASS_NO_ROUTE);
    struct hop hop = find(c, destination);
    if (!hop.address)
        return pass(PASS_NO_ROUTE);
    if (!hop.direct)
        return pass(PASS_NOT_FLANCTL);
    if (gso_size) {
        all = headers(skb, mac_header, ip->ihl, ip->protocol);
        unit = all + gso_size;
        if (!all)
            return pass(PASS_OTHER);
    }
    if (unit > c->mtu || length + sizeof(struct outer) > 0xffff)
        return pass(PASS_TOO_BIG);

    struct bpf_fib_lookup fib = {
        .family = AF_INET,
        .l4_protocol = IPPROTO_UDP,
        .sport = c->port,
        .dport = c->port,
        .tot_len = unit + sizeof(struct outer),
        .ifindex = c->tun,
        .ipv4_src = c->local,
        .ipv4_dst = hop.address,
    };
    long found = bpf_fib_lookup(skb, &fib, sizeof(fib), 0);
    if (found == BPF_FIB_LKUP_RET_FRAG_NEEDED)
        return pass(PASS_TOO_BIG);
    if ((found != BPF_FIB_LKUP_RET_SUCCESS && found != BPF_FIB_LKUP_RET_NO_NEIGH) || fib.family != AF_INET ||
        !is_uplink(c, fib.ifindex))
        return pass(PASS_NO_UPLINK);

    struct outer outer = {
        .ip =
            {
                .version = 4,
                .ihl = 5,
                .tot_len = bpf_htons(length + sizeof(outer)),
                .id = bpf_get_prandom_u32(),
                .ttl = TTL,
                .protocol = IPPROTO_UDP,
                .saddr = c->local,
                .daddr = hop.address,
            },
        /* No checksum (RFC 768): the inner packet has its own, which the network card may have yet to make. DF is
         * clear, for nobody here would hear of a router that cannot forward it. */
        .udp = {.source = c->port, .dest = c->port, .len = bpf_htons(length + sizeof(struct udphdr))},
    };
    outer.ip.check = header_checksum(&outer.ip);
    if (bpf_skb_adjust_room(skb, sizeof(outer), BPF_ADJ_ROOM_MAC,
                            BPF_F_ADJ_ROOM_FIXED_GSO | BPF_F_ADJ_ROOM_ENCAP_L3_IPV4 | BPF_F_ADJ_ROOM_ENCAP_L4_UDP))
        return pass(PASS_OTHER);
    /* redirect_neigh fills a MAC header that must be there. */
    if (bpf_skb_store_bytes(skb, mac_header, &outer, sizeof(outer), 0) ||
        (!mac_header && bpf_skb_change_head(skb, ETH_HLEN, 0)))
        return drop(DROP_SEND_ERROR);
    __u32 packets = segments(length, all, gso_size), bytes = length + (packets - 1) * all;
    count(SENT, packets, bytes);
    struct traffic *peer = peer_at(hop.address);
    if (peer) {
        peer->out_packets += packets;
        peer->out_bytes += bytes;
    }
    /* With a next hop the kernel need not look again, but the packet keeps flannel0's route, and by that one it would
     * leave the queue of a neighbour that has yet to answer (net/core/neighbour.c, neigh_update). */
    if (found == BPF_FIB_LKUP_RET_NO_NEIGH)
        return bpf_redirect_neigh(fib.ifindex, NULL, 0, 0);
    struct bpf_redir_neigh next = {.nh_family = AF_INET, .ipv4_nh = fib.ipv4_dst};
    return bpf_redirect_neigh(fib.ifindex, &next, sizeof(next), 0);
}

/* Is there anything in this TCP segment that must not arrive before another? A bare acknowledgement may. */
static __always_inline bool has_data(struct __sk_buff *skb, __u32 inner, __u32 ihl) {
    struct {
        __u8 offset, flags;
    } tcp;
    if (bpf_skb_load_bytes(skb, FRAME + ihl * 4 + 12, &tcp, sizeof(tcp)))
        return false;
    return tcp.flags & TCP_FIN_SYN_RST || inner > ihl * 4 + (tcp.offset >> 4) * 4u;
}

/* Take the datagram's header off not here but in the kernel's own tunnel code, by making it one of VXLAN-GPE.
 *
 * That does two things we cannot. A super-packet from a virtual wire bears the mark of a tunnel (skb->encapsulation), which
 * stays when flanctl_dec takes the header off, and whoever forwards it, as docker0 does, then cuts it into its segments
 * (net/core/dev.c, netif_skb_features); vxlan_rcv takes off the mark as well. And what a network card delivers one by one is
 * put together again (gro_cells). So this is for TCP's data that goes beyond this host; the way costs what a short
 * packet has no gain from.
 *
 * The port stays ours, so that rules on INPUT find what they know; the socket is given by hand. TC_ACT_UNSPEC: nothing was
 * done. */
static __always_inline int by_stack(struct __sk_buff *skb, const struct config *c, __be32 sender, __u32 inner) {
    if (!c->rx_port || inner + sizeof(struct outer) + sizeof(struct gpe) > 0xffff)
        return TC_ACT_UNSPEC;
    struct bpf_sock_tuple to = {.ipv4 = {.saddr = sender, .sport = c->port, .daddr = c->local, .dport = c->rx_port}};
    struct bpf_sock *socket = bpf_sk_lookup_udp(skb, &to, sizeof(to.ipv4), BPF_F_CURRENT_NETNS, 0);
    if (!socket)
        return TC_ACT_UNSPEC;
    if (bpf_skb_adjust_room(skb, sizeof(struct gpe), BPF_ADJ_ROOM_NET, BPF_F_ADJ_ROOM_FIXED_GSO)) {
        bpf_sk_release(socket);
        return TC_ACT_UNSPEC;
    }
    struct {
        struct outer outer;
        struct gpe gpe;
    } header = {
        .outer = {.ip =
                      {
                          .version = 4,
                          .ihl = 5,
                          .tot_len = bpf_htons(inner + sizeof(header)),
                          .ttl = TTL,
                          .protocol = IPPROTO_UDP,
                          .saddr = sender,
                          .daddr = c->local,
                      },
                  .udp =
                      {
                          .source = 0, /* as the socket's other end: NAT takes away one that has another (nf_nat_ipv4_local_in) */
                          .dest = c->port,
                          .len = bpf_htons(inner + sizeof(struct udphdr) + sizeof(struct gpe)),
                      }},
        .gpe = {.flags = 0x0c, .next_protocol = 1, .vni = bpf_htonl(c->rx_vni << 8)},
    };
    header.outer.ip.check = header_checksum(&header.outer.ip);
    long failed = bpf_skb_store_bytes(skb, ETH_HLEN, &header, sizeof(header), 0) || bpf_sk_assign(skb, socket, 0);
    bpf_sk_release(socket);
    if (failed)
        return TC_ACT_SHOT;
    count(STACK_GIVEN, 1, 0);
    skb->tc_classid = c->rx_mark; /* TC_ACT_OK makes it the tc_index */
    return TC_ACT_OK;
}

SEC("classifier") int flanctl_dec(struct __sk_buff *skb) {
    __u32 zero = 0, length = skb->len, gso_size = skb->gso_size;
    struct config *c = bpf_map_lookup_elem(&config, &zero);
    if (!c || skb->protocol != bpf_htons(ETH_P_IP) || skb->pkt_type != PACKET_HOST || skb->vlan_present ||
        !readable(skb, FRAME))
        return TC_ACT_UNSPEC;
    void *end = (void *)(long)skb->data_end;
    struct outer *outer = (void *)(long)skb->data + ETH_HLEN;
    if ((void *)(outer + 1) > end)
        return TC_ACT_UNSPEC;
    if (outer->ip.protocol != IPPROTO_UDP || outer->udp.dest != c->port || outer->ip.daddr != c->local ||
        outer->ip.version != 4 || outer->ip.ihl != 5)
        return TC_ACT_UNSPEC;
    /* The stack puts fragments together, checks lengths, and gives the datagram to the socket. */
    if (outer->ip.frag_off & bpf_htons(FRAGMENT) || bpf_ntohs(outer->ip.tot_len) + ETH_HLEN != length ||
        bpf_ntohs(outer->udp.len) + sizeof(struct iphdr) + ETH_HLEN != length)
        return pass(PASS_OTHER);
    __u64 now = bpf_ktime_get_boot_ns();
    if (now >= c->valid_until || !bpf_map_lookup_elem(&device, &zero))
        return pass(PASS_EXPIRED);

    __be32 sender = outer->ip.saddr;
    bool partial = unfinished(outer);
    __u32 check = c->peer_check, bad = 0;
    struct traffic *peer = peer_at(sender);
    if (!readable(skb, FRAME + INNER)) {
        bad = DROP_SHORT;
    } else {
        struct iphdr *ip = (void *)(long)skb->data + FRAME;
        if ((void *)(ip + 1) > (void *)(long)skb->data_end)
            return pass(PASS_OTHER);
        __u32 inner = bpf_ntohs(ip->tot_len), ihl = ip->ihl;
        if (ip->version != 4)
            bad = DROP_BAD_VERSION;
        else if (ihl < 5 || ihl * 4 > inner || inner + FRAME != length)
            bad = DROP_BAD_LENGTH;
        if (!bad) {
            __be32 source = ip->saddr, destination = ip->daddr;
            __u8 protocol = ip->protocol;
            if (check != CHECK_OFF) {
                struct hop hop = find(c, source);
                bool believed = hop.address && (check != CHECK_STRICT || hop.address == sender);
                if (!believed) {
                    if (!peer && check == CHECK_STRICT)
                        return drop(DROP_UNKNOWN_SENDER);
                    /* A process on the peer itself that is bound to the public IP. */
                    believed = peer && source == sender;
                }
                if (!believed || is_own(c, source))
                    return refuse(peer, DROP_SPOOFED_SOURCE);
            }
            if (!is_own(c, destination) || is_group(destination) ||
                (c->own_mask < 0xfffffffe && bpf_ntohl(destination) == (c->own | ~c->own_mask)))
                return refuse(peer, DROP_FOREIGN_DESTINATION);
            if (partial || (gso_size && protocol == IPPROTO_UDP))
                return pass(PASS_OTHER);
            if (!gso_size && inner > c->mtu)
                return pass(PASS_TOO_BIG);
            __u32 all = gso_size ? headers(skb, FRAME, ihl, protocol) : 0;
            __u32 packets = segments(inner, all, gso_size), bytes = inner + (packets - 1) * all;
            bool up = protocol == IPPROTO_TCP && bpf_ntohl(destination) != c->own && has_data(skb, inner, ihl);
            int done = up ? by_stack(skb, c, sender, inner) : TC_ACT_UNSPEC;
            if (done == TC_ACT_UNSPEC) {
                __u32 tun = c->tun;
                if (bpf_skb_adjust_room(skb, -(__s32)sizeof(struct outer), BPF_ADJ_ROOM_MAC, BPF_F_ADJ_ROOM_FIXED_GSO))
                    return pass(PASS_OTHER);
                done = bpf_redirect(tun, BPF_F_INGRESS);
            }
            if (done == TC_ACT_SHOT)
                return refuse(peer, DROP_TUN_ERROR);
            count(RECEIVED, packets, bytes);
            if (peer) {
                peer->in_packets += packets;
                peer->in_bytes += bytes;
                peer->heard = now;
            }
            return done;
        }
    }
    /* Datagrams the kernel has put together or not cut yet: each is looked at by itself, behind the socket. */
    if (gso_size)
        return pass(PASS_OTHER);
    if (check == CHECK_STRICT && !peer)
        bad = DROP_UNKNOWN_SENDER;
    return refuse(peer, bad);
}

/* From flannel0-rx on, a packet goes on as if it had come by flannel0. */
SEC("classifier") int flanctl_rx(struct __sk_buff *skb) {
    __u32 zero = 0;
    struct config *c = bpf_map_lookup_elem(&config, &zero);
    struct bpf_tunnel_key key = {};
    if (!c || skb->tc_index != c->rx_mark ||
        bpf_skb_get_tunnel_key(skb, &key, offsetof(struct bpf_tunnel_key, remote_ipv6[1]), 0) || key.tunnel_id != c->rx_vni)
        return drop(DROP_UNKNOWN_SENDER); /* somebody found the port: flanctl_dec did not look at this one */
    count(STACK_RETURNED, 1, 0);
    skb->tc_index = 0;
    return bpf_redirect(c->tun, BPF_F_INGRESS);
}

char _license[] SEC("license") = "Dual MIT/GPL";
