// The load of bench.ts: keeps a number of connections busy, checks every answer, and prints how
// many there were and how many nanoseconds they took. It is in C, since a client that runs on
// Node.js takes longer for a check than the server does, and so would measure only itself.
//
//   bench-client lines|http|own|pipelined PORT AT_A_TIME CHECKS
//
// It always waits for the connection that was asked first, since servers answer in about that
// order. That takes fewer system calls than to poll all connections, and keeps the client the
// faster one of the two.

#include <arpa/inet.h>
#include <err.h>
#include <netinet/in.h>
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
    "GET /health_check HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n";
static const char OWN_REQUEST[] = "GET / HTTP/1.1\r\nHost: localhost\r\n\r\n";

static const char OK[] = "OK\n";
static const char HTTP_BEGIN[] = "HTTP/1.1 200 ";
static const char HTTP_END[] = "\r\n\r\nOK\n";

// What is asked, and how; see choose().
static const char *question;
static size_t answers_each = 1; // to one question
static bool is_http = false;
static bool stays_connected = false;
static struct sockaddr_in server;

static void choose(const char *kind) {
  if (strcmp(kind, "lines") == 0) {
    question = LINE;
  } else if (strcmp(kind, "http") == 0) {
    question = HTTP_CHECK;
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

static bool is_right_http(const char *reply, size_t length) {
  size_t begin_length = strlen(HTTP_BEGIN);
  size_t end_length = strlen(HTTP_END);
  if (length < begin_length + end_length) return false;
  if (memcmp(reply, HTTP_BEGIN, begin_length) != 0) return false;
  return memcmp(reply + length - end_length, HTTP_END, end_length) == 0;
}

static bool is_right(const char *reply, size_t length) {
  if (is_http) return is_right_http(reply, length);
  if (length != strlen(OK) * answers_each) return false;
  for (size_t at = 0; at < length; at += strlen(OK)) {
    if (memcmp(reply + at, OK, strlen(OK)) != 0) return false;
  }
  return true;
}

// Reads until the server closes or, where the connection stays, until the answer is complete.
static void read_answer(int fd) {
  char reply[REPLY_MAX];
  size_t received = 0;
  bool is_complete = false;
  while (!is_complete) {
    int flags = stays_connected ? 0 : MSG_WAITALL;
    ssize_t length = recv(fd, reply + received, REPLY_MAX - received, flags);
    if (length < 0) err(1, "cannot read");
    received += length;
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

int main(int count, char **words) {
  if (count != 5) errx(1, "usage: bench-client lines|http|own|pipelined PORT AT_A_TIME CHECKS");
  choose(words[1]);
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
