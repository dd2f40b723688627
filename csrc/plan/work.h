// What the threads of a call do: all runs in order, together or each with windows of its own.

#pragma once

#include <vector>

#include "run.h"

// A thread and its memory.
struct Thread {
  int id, threads;
  char *scratch, *shared;
  char *own_shared, *own_window;  // while it takes windows alone
  const float* zeros;
};

// Every thread calls it with the same runs, whose counters are zero.
void work(std::vector<Run>& runs, const Thread& thread);
