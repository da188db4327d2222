/*
 * Small UDP packets, sent at a given rate and counted where they arrive: iperf3 spends more on a packet than the
 * tunnels do.
 *
 *   packets receive ADDRESS PORT
 *       until no packet has come for a second; prints "received PACKETS SECONDS"
 *   packets send SOURCE TARGET PORT FLOWS SMALLEST LARGEST PER_SECOND SECONDS
 *       FLOWS sockets in turn, sizes of UDP payload between SMALLEST and LARGEST, one send(2) each, so that the kernel
 *       may not merge them before the tunnel; PER_SECOND 0 is as fast as it goes; prints "sent PACKETS SECONDS"
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <time.h>

enum { BATCH = 64, LONGEST = 2048, MOST_FLOWS = 256, BUFFER = 16 << 20 };

static double seconds_now(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (double)now.tv_sec + (double)now.tv_nsec * 1e-9;
}

static void fail(const char *what)
{
    perror(what);
    exit(1);
}

static struct sockaddr_in address_of(const char *address, const char *port)
{
    struct sockaddr_in name = {.sin_family = AF_INET, .sin_port = htons((uint16_t)atoi(port))};
    if (inet_pton(AF_INET, address, &name.sin_addr) != 1) {
        fprintf(stderr, "%s is no IPv4 address\n", address);
        exit(2);
    }
    return name;
}

static int bound_socket(struct sockaddr_in name)
{
    int fd = socket(AF_INET, SOCK_DGRAM | SOCK_CLOEXEC, 0);
    int buffer = BUFFER;
    if (fd < 0 || bind(fd, (struct sockaddr *)&name, sizeof name) < 0)
        fail("bind");
    setsockopt(fd, SOL_SOCKET, SO_RCVBUFFORCE, &buffer, sizeof buffer);
    setsockopt(fd, SOL_SOCKET, SO_SNDBUFFORCE, &buffer, sizeof buffer);
    return fd;
}

static int receive(char **arguments)
{
    static char bytes[BATCH][LONGEST];
    struct iovec pieces[BATCH];
    struct mmsghdr messages[BATCH];
    struct timeval silence = {.tv_sec = 1};
    int fd = bound_socket(address_of(arguments[0], arguments[1]));
    setsockopt(fd, SOL_SOCKET, SO_RCVTIMEO, &silence, sizeof silence);
    memset(messages, 0, sizeof messages);
    for (int i = 0; i < BATCH; i++) {
        pieces[i] = (struct iovec){bytes[i], LONGEST};
        messages[i].msg_hdr = (struct msghdr){.msg_iov = &pieces[i], .msg_iovlen = 1};
    }
    puts("listening");
    fflush(stdout);
    long count = 0;
    double first = 0, last = 0;
    for (;;) {
        int got = recvmmsg(fd, messages, BATCH, MSG_WAITFORONE, NULL);
        if (got <= 0 && count > 0)
            break;
        if (got <= 0)
            continue;
        last = seconds_now();
        if (count == 0)
            first = last;
        count += got;
    }
    printf("received %ld %.4f\n", count, last - first);
    return 0;
}

static int send_all(char **arguments)
{
    static char bytes[LONGEST];
    int flows = atoi(arguments[3]), smallest = atoi(arguments[4]), largest = atoi(arguments[5]);
    double rate = atof(arguments[6]), length = atof(arguments[7]);
    int fds[MOST_FLOWS];
    if (flows < 1 || flows > MOST_FLOWS || smallest < 0 || largest < smallest || largest > LONGEST)
        return 2;
    struct sockaddr_in target = address_of(arguments[1], arguments[2]);
    for (int i = 0; i < flows; i++) {
        fds[i] = bound_socket(address_of(arguments[0], "0"));
        if (connect(fds[i], (struct sockaddr *)&target, sizeof target) < 0)
            fail("connect");
    }
    unsigned int random = 1;
    long count = 0;
    double begin = seconds_now(), gone = 0;
    while ((gone = seconds_now() - begin) < length) {
        long due = rate > 0 ? (long)(rate * gone) : count + BATCH;
        if (due <= count) {
            struct timespec nap = {.tv_nsec = 50000};
            nanosleep(&nap, NULL);
        }
        for (; count < due; count++) {
            random = random * 1103515245u + 12345u;
            int size = smallest + (int)((random >> 12) % (unsigned int)(largest - smallest + 1));
            /* A full queue is what "as fast as it goes" finds out; the receiver counts. */
            (void)!send(fds[count % flows], bytes, (size_t)size, 0);
        }
    }
    printf("sent %ld %.4f\n", count, gone);
    return 0;
}

int main(int count, char **arguments)
{
    if (count == 4 && strcmp(arguments[1], "receive") == 0)
        return receive(arguments + 2);
    if (count == 10 && strcmp(arguments[1], "send") == 0)
        return send_all(arguments + 2);
    fputs("usage: see the head of packets.c\n", stderr);
    return 2;
}
