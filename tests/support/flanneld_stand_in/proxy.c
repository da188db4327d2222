/*
 * The packet loop of flanneld's udp backend, written anew from what is known of its behaviour: the table in flannel's
 * facts (one packet a read, one a sendto; first route that matches, moved to the front; TTL minus 1 each way; net
 * unreachable from the TUN's address) and the recorded bytes in tests/vectors/udp-proxy.json, which it must reproduce.
 *
 *   proxy TUN-FD SOCKET-FD CONTROL-FD TUN-ADDRESS MTU
 *
 * CONTROL-FD speaks flanneld's 20-byte messages. Ends with 0 at a stop message or when the other end is closed.
 */
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <poll.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <signal.h>
#include <unistd.h>

enum { SET = 1, DEL = 2, STOP = 3, MAX_ROUTES = 65536 };

struct message {
	int32_t what;
	uint32_t net; /* this and the next hop in network order */
	int32_t length;
	uint32_t next_hop;
	uint16_t port;
	uint16_t unused;
};

struct route {
	uint32_t net, mask;
	struct sockaddr_in to;
};

static struct route routes[MAX_ROUTES];
static int route_count;
static int tun, sock, control;
static uint32_t tun_address;
static unsigned char *buffer;
static size_t mtu;
static int stopped;

static uint16_t load16(const unsigned char *at) { return (uint16_t)(at[0] << 8 | at[1]); }

static void store16(unsigned char *at, unsigned value)
{
	at[0] = (unsigned char)(value >> 8);
	at[1] = (unsigned char)value;
}

/* RFC 1071, over an even or odd number of bytes. */
static uint16_t checksum(const unsigned char *at, size_t length)
{
	uint32_t sum = 0;
	for (size_t i = 0; i + 1 < length; i += 2)
		sum += load16(at + i);
	if (length & 1)
		sum += (uint32_t)at[length - 1] << 8;
	while (sum >> 16)
		sum = (sum & 0xffff) + (sum >> 16);
	return (uint16_t)~sum;
}

/* False: this was the last hop. Zero wraps to 255. The checksum is patched, never verified (RFC 1624). */
static int count_hop(unsigned char *packet)
{
	uint32_t sum = load16(packet + 10) + 0x0100u;
	packet[8]--;
	if (packet[8] == 0)
		return 0;
	store16(packet + 10, (sum + (sum >= 0xffff)) & 0xffff);
	return 1;
}

static struct sockaddr_in *find(uint32_t destination)
{
	for (int i = 0; i < route_count; i++) {
		if ((destination & routes[i].mask) == routes[i].net) {
			if (i != 0) {
				struct route first = routes[0];
				routes[0] = routes[i];
				routes[i] = first;
			}
			return &routes[0].to;
		}
	}
	return NULL;
}

static void tell_unreachable(const unsigned char *packet, size_t length)
{
	unsigned char answer[20 + 8 + 60 + 8] = {0};
	size_t header = (size_t)(packet[0] & 15) * 4, quoted;

	if (packet[9] == IPPROTO_ICMP || (load16(packet + 6) & 0x1fff) != 0 || header > 56)
		return;
	quoted = header + 8 < length ? header + 8 : length;
	answer[0] = 0x45;
	store16(answer + 2, (unsigned)(28 + quoted));
	answer[8] = 8;
	answer[9] = IPPROTO_ICMP;
	memcpy(answer + 12, &tun_address, 4);
	memcpy(answer + 16, packet + 12, 4);
	store16(answer + 10, checksum(answer, 20));
	answer[20] = 3; /* destination unreachable, code 0: network */
	memcpy(answer + 28, packet, quoted);
	store16(answer + 22, checksum(answer + 20, 8 + quoted));
	if (write(tun, answer, 28 + quoted) < 0)
		return; /* the kernel drops it as martian anyway */
}

static int from_tun(void)
{
	uint32_t destination;
	struct sockaddr_in *to;
	ssize_t got = read(tun, buffer, mtu);

	if (got <= 0)
		return 0;
	if (got < 20)
		return 1;
	memcpy(&destination, buffer + 16, 4);
	to = find(destination);
	if (to == NULL)
		tell_unreachable(buffer, (size_t)got);
	else if (count_hop(buffer))
		while (sendto(sock, buffer, (size_t)got, 0, (struct sockaddr *)to, sizeof *to) < 0 && errno == EAGAIN) {
			struct pollfd wait = {.fd = sock, .events = POLLOUT};
			poll(&wait, 1, -1);
		}
	return 1;
}

static int from_peers(void)
{
	ssize_t got = recv(sock, buffer, mtu, 0);

	if (got < 0) /* a peer's port unreachable is told here once */
		return errno != EAGAIN && errno != EINTR;
	if (got >= 20 && count_hop(buffer) && write(tun, buffer, (size_t)got) < 0)
		return 1; /* dropped, as flanneld does */
	return 1;
}

static void obey(void)
{
	struct message said;
	ssize_t got = recv(control, &said, sizeof said, 0);
	uint32_t mask;
	int i;

	if (got == 0) {
		stopped = 1;
		return;
	}
	if (got != (ssize_t)sizeof said)
		return;
	if (said.what == STOP) {
		stopped = 1;
		return;
	}
	mask = said.length <= 0 ? 0 : htonl(0xffffffffu << (32 - (said.length > 32 ? 32 : said.length)));
	for (i = 0; i < route_count; i++)
		if (routes[i].net == (said.net & mask) && routes[i].mask == mask)
			break;
	if (said.what == SET && i < MAX_ROUTES) {
		if (i == route_count)
			route_count++;
		routes[i].net = said.net & mask;
		routes[i].mask = mask;
		memset(&routes[i].to, 0, sizeof routes[i].to);
		routes[i].to.sin_family = AF_INET;
		routes[i].to.sin_addr.s_addr = said.next_hop;
		routes[i].to.sin_port = htons(said.port);
	} else if (said.what == DEL && i < route_count) {
		routes[i] = routes[--route_count];
	}
}

int main(int count, char **words)
{
	if (count != 6 || inet_pton(AF_INET, words[4], &tun_address) != 1) {
		fprintf(stderr, "usage: %s TUN-FD SOCKET-FD CONTROL-FD TUN-ADDRESS MTU\n", words[0]);
		return 2;
	}
	tun = atoi(words[1]);
	sock = atoi(words[2]);
	control = atoi(words[3]);
	mtu = (size_t)atoi(words[5]);
	buffer = malloc(mtu);
	if (buffer == NULL || prctl(PR_SET_PDEATHSIG, SIGKILL) < 0 || fcntl(tun, F_SETFL, O_NONBLOCK) < 0
	    || fcntl(sock, F_SETFL, O_NONBLOCK) < 0) {
		perror(words[0]);
		return 1;
	}
	while (!stopped) {
		struct pollfd wait[] = {
			{.fd = tun, .events = POLLIN}, {.fd = sock, .events = POLLIN}, {.fd = control, .events = POLLIN}};

		if (poll(wait, 3, -1) < 0) {
			if (errno == EINTR)
				continue;
			perror(words[0]);
			return 1;
		}
		if (wait[2].revents)
			obey();
		/* While packets come nobody looks at the control socket: so it starves under load there too. */
		if (wait[0].revents || wait[1].revents)
			while (from_tun() | from_peers())
				;
	}
	return 0;
}
