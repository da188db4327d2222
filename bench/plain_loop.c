/*
 * The plain loop, flanneld's way: one read, one sendto, one recvfrom, one write; a list of routes searched from its
 * front, a hit moved there; the TTL counted down. What flannel's udp backend costs, without Go around it.
 *
 *   plain_loop DEVICE ADDRESS PORT MTU NETWORK/LENGTH=PEER...
 *       makes the TUN DEVICE, binds ADDRESS:PORT, prints "ready", runs until it is ended
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/if_tun.h>
#include <net/if.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/socket.h>
#include <unistd.h>

struct route {
    uint32_t network, mask;
    struct sockaddr_in peer;
};

enum { MOST_ROUTES = 16384, HEADER = 20 };
static struct route routes[MOST_ROUTES];
static int route_count;

static void fail(const char *what)
{
    perror(what);
    exit(1);
}

static struct sockaddr_in *look_up(uint32_t destination)
{
    for (int i = 0; i < route_count; i++) {
        if ((destination & routes[i].mask) != routes[i].network)
            continue;
        struct route hit = routes[i];
        memmove(&routes[1], &routes[0], (size_t)i * sizeof hit);
        routes[0] = hit;
        return &routes[0].peer;
    }
    return NULL;
}

/* One hop less, the header's checksum put right (RFC 1624). False: it ends here. */
static int hop(unsigned char *packet)
{
    uint32_t sum = (uint32_t)(packet[10] << 8 | packet[11]) + 0x100;
    if (--packet[8] == 0)
        return 0;
    sum += sum >> 16;
    packet[10] = (unsigned char)(sum >> 8);
    packet[11] = (unsigned char)sum;
    return 1;
}

static int open_tun(const char *name)
{
    struct ifreq request = {.ifr_flags = IFF_TUN | IFF_NO_PI};
    int fd = open("/dev/net/tun", O_RDWR | O_CLOEXEC | O_NONBLOCK);
    snprintf(request.ifr_name, sizeof request.ifr_name, "%s", name);
    if (fd < 0 || ioctl(fd, TUNSETIFF, &request) < 0)
        fail(name);
    return fd;
}

static void add_route(char *text, const char *port)
{
    char *slash = strchr(text, '/'), *equals = strchr(text, '=');
    struct route *route = &routes[route_count++];
    struct in_addr network;
    if (!slash || !equals || route_count > MOST_ROUTES)
        exit(2);
    *slash = *equals = 0;
    int length = atoi(slash + 1);
    route->mask = length ? htonl(~0u << (32 - length)) : 0;
    if (inet_pton(AF_INET, text, &network) != 1 || inet_pton(AF_INET, equals + 1, &route->peer.sin_addr) != 1)
        exit(2);
    route->network = network.s_addr;
    route->peer.sin_family = AF_INET;
    route->peer.sin_port = htons((uint16_t)atoi(port));
}

int main(int count, char **arguments)
{
    static unsigned char packet[65536];
    if (count < 5)
        return 2;
    size_t mtu = (size_t)atoi(arguments[4]);
    for (int i = 5; i < count; i++)
        add_route(arguments[i], arguments[3]);
    int tun = open_tun(arguments[1]), udp = socket(AF_INET, SOCK_DGRAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
    struct sockaddr_in name = {.sin_family = AF_INET, .sin_port = htons((uint16_t)atoi(arguments[3]))};
    if (inet_pton(AF_INET, arguments[2], &name.sin_addr) != 1 || bind(udp, (struct sockaddr *)&name, sizeof name) < 0)
        fail("bind");
    puts("ready");
    fflush(stdout);
    struct pollfd both[] = {{.fd = tun, .events = POLLIN}, {.fd = udp, .events = POLLIN}};
    for (;;) {
        if (poll(both, 2, -1) < 0 && errno != EINTR)
            fail("poll");
        ssize_t got;
        if (both[0].revents && (got = read(tun, packet, mtu)) >= HEADER) {
            uint32_t destination;
            memcpy(&destination, packet + 16, sizeof destination);
            struct sockaddr_in *peer = look_up(destination);
            if (peer && hop(packet))
                (void)!sendto(udp, packet, (size_t)got, 0, (struct sockaddr *)peer, sizeof *peer);
        }
        if (both[1].revents && (got = recv(udp, packet, mtu, 0)) >= HEADER && hop(packet))
            (void)!write(tun, packet, (size_t)got);
    }
}
