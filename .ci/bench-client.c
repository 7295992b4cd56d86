// The load of bench.ts: keeps a number of connections busy, checks every answer, and prints how
// many there were and how many nanoseconds they took. It is in C, since a client that runs on
// Node.js takes longer for a check than the server does, and so would measure only itself.
//
//   bench-client lines|http|own|pipelined PORT AT_A_TIME CHECKS [PATH BODY]
//
// PATH and BODY are for other servers than ours: what they are asked over HTTP, and a text that
// must be in the body of their answer.
//
// It always waits for the connection that was asked first, since servers answer in about that
// order: to look at all of them would make the client the slower one of the two.

#include <arpa/inet.h>
#include <err.h>
#include <errno.h>
#include <netinet/in.h>
#include <sched.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

enum { AT_A_TIME_MAX = 1024, REPLY_MAX = 4096, PIPELINED = 1000, GIVE_UP_SECONDS = 60 };

static const char LINE[] = "health_check\n";
static const char HTTP_CHECK[] =
    "GET %s HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n";
static const char OWN_REQUEST[] = "GET / HTTP/1.1\r\nHost: localhost\r\n\r\n";

static const char OK[] = "OK\n";
static const char HTTP_BEGIN[] = "HTTP/1.1 200 ";
static const char HTTP_HEAD_END[] = "\r\n\r\n";

// What is asked, and how; see choose().
static const char *question;
static const char *body = OK;
static size_t answers_each = 1; // to one question
static bool is_http = false;
static bool stays_connected = false;
static struct sockaddr_in server;

static void choose(const char *kind, const char *path) {
  if (strcmp(kind, "lines") == 0) {
    question = LINE;
  } else if (strcmp(kind, "http") == 0) {
    static char check[256];
    snprintf(check, sizeof check, HTTP_CHECK, path);
    question = check;
    is_http = true;
  } else if (strcmp(kind, "own") == 0) {
    question = OWN_REQUEST;
    is_http = true;
    stays_connected = true;
  } else if (strcmp(kind, "pipelined") == 0) {
    static char lines[PIPELINED * sizeof LINE];
    for (int count = 0; count < PIPELINED; count++) strcat(lines, LINE);
    question = lines;
    answers_each = PIPELINED;
    stays_connected = true;
  } else {
    errx(1, "knows no %s", kind);
  }
}

static void send_text(int fd, const char *text) {
  size_t length = strlen(text);
  if (send(fd, text, length, MSG_NOSIGNAL) != (ssize_t)length) err(1, "cannot send");
}

// The monitor closes after one command unless it is told that more are to come.
static void enter_interactive_mode(int fd) {
  char greeting[128];
  send_text(fd, "interactive\n");
  ssize_t length = recv(fd, greeting, sizeof greeting, 0);
  if (length <= 0 || greeting[length - 1] != '\n') errx(1, "no interactive mode");
}

static int open_connection(void) {
  int fd = socket(AF_INET, SOCK_STREAM, 0);
  if (fd < 0) err(1, "cannot open a socket");
  if (connect(fd, (struct sockaddr *)&server, sizeof server) < 0) err(1, "cannot connect");
  if (answers_each > 1) enter_interactive_mode(fd);
  return fd;
}

// The body need not be all that follows the head, since some send it in chunks.
static bool is_right_http(const char *reply) {
  if (strncmp(reply, HTTP_BEGIN, strlen(HTTP_BEGIN)) != 0) return false;
  const char *head_end = strstr(reply, HTTP_HEAD_END);
  return head_end != NULL && strstr(head_end, body) != NULL;
}

static bool is_right(const char *reply, size_t length) {
  if (is_http) return is_right_http(reply);
  if (length != strlen(OK) * answers_each) return false;
  for (size_t at = 0; at < length; at += strlen(OK)) {
    if (memcmp(reply + at, OK, strlen(OK)) != 0) return false;
  }
  return true;
}

// Waits for bytes without sleeping: it costs the server time to wake a client, and the slower server
// would have to do that more often, since a client finds the next answer of a fast one already there.
static ssize_t receive(int fd, char *buffer, size_t size) {
  for (;;) {
    ssize_t length = recv(fd, buffer, size, MSG_DONTWAIT);
    if (length >= 0 || errno != EAGAIN) return length;
    sched_yield(); // to the server, where both are on one core
  }
}

// Reads until the server closes or, where the connection stays, until the answer is complete.
static void read_answer(int fd) {
  char reply[REPLY_MAX + 1];
  size_t received = 0;
  bool is_complete = false;
  while (!is_complete) {
    ssize_t length = receive(fd, reply + received, REPLY_MAX - received);
    if (length < 0) err(1, "cannot read");
    received += length;
    reply[received] = '\0';
    is_complete = length == 0 || (stays_connected && is_right(reply, received));
  }
  if (!is_right(reply, received)) errx(1, "a wrong answer: %.*s", (int)received, reply);
}

// Asks the given number of questions, and keeps as many unanswered as there are connections.
static void run(long questions, int at_a_time) {
  int connections[AT_A_TIME_MAX]; // which take turns
  long asked = 0;
  for (long answered = 0; answered < questions; answered++) {
    while (asked < questions && asked < answered + at_a_time) {
      int *connection = &connections[asked % at_a_time];
      bool is_open = stays_connected && asked >= at_a_time;
      if (!is_open) *connection = open_connection();
      send_text(*connection, question);
      asked++;
    }

    int oldest = connections[answered % at_a_time];
    read_answer(oldest);
    if (!stays_connected) close(oldest);
  }
}

static long nanoseconds(void) {
  struct timespec now;
  clock_gettime(CLOCK_MONOTONIC, &now);
  return now.tv_sec * 1000000000L + now.tv_nsec;
}

static const char USAGE[] =
    "usage: bench-client lines|http|own|pipelined PORT AT_A_TIME CHECKS [PATH BODY]";

int main(int count, char **words) {
  if (count != 5 && count != 7) errx(1, "%s", USAGE);
  const char *path = "/health_check";
  if (count == 7) {
    path = words[5];
    body = words[6];
  }
  choose(words[1], path);
  server.sin_family = AF_INET;
  server.sin_port = htons(atoi(words[2]));
  server.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
  int at_a_time = atoi(words[3]);
  if (at_a_time < 1 || at_a_time > AT_A_TIME_MAX) errx(1, "AT_A_TIME is 1 to %d", AT_A_TIME_MAX);
  long questions = atol(words[4]) / answers_each;
  alarm(GIVE_UP_SECONDS); // ends this process if the server never answers

  long started = nanoseconds();
  run(questions, at_a_time);
  printf("%ld %ld\n", questions * (long)answers_each, nanoseconds() - started);
  return 0;
}
