"""Bounds in time, for machines that are slow at times. Every test that waits for something, or asserts that it came in
time, does so by this file: a bound is that of a machine which has nothing else to do, and grows by as much as this one
is slower just then."""
import asyncio, inspect, subprocess, sys, time

QUIET = .12   # seconds that the probe takes where nothing else runs

def slowness():
    """How many times slower this machine is just now than one that has nothing else to do (at least 1): by the start of
    an interpreter"""
    t = Timer()
    subprocess.run([sys.executable, '-c', 'import asyncio, json'], check=True)
    return max(1, float(t)/QUIET)

class Timer:
    """Seconds since it was made: `float(timer)`, or compared. `timer < 5` is a bound: where it would be false, 5 is
    taken as many times as the machine is slower just now, which blocks for as long as an interpreter starts. `timer >
    5` is as it says."""
    def __init__(self): self.start = time.monotonic()
    def __float__(self): return time.monotonic() - self.start
    def __lt__(self, o): return (t := float(self)) < o or t < o*slowness()
    def __gt__(self, o): return float(self) > o
    def __repr__(self): return f'{float(self):.2f} s'

class Deadline:
    """`timeout` seconds from now; when they are over, as many more as the machine is slower then, so that a bound on a
    quiet machine is one on a busy one"""
    def __init__(self, timeout): self.timer, self.timeout, self.probed = Timer(), timeout, False
    def passed(self):
        "Whether the time is over. Blocks for as long as an interpreter starts, once"
        if float(self.timer) < self.timeout or self.probed: return self.timer > self.timeout
        self.timeout, self.probed = self.timeout*slowness(), True
        return self.passed()

def wait(cond, timeout=10, what='condition', pause=.02):
    "Call `cond` until it is true, and return what it returned; TimeoutError after `timeout` seconds"
    deadline = Deadline(timeout)
    while not (r := cond()):
        if deadline.passed(): raise TimeoutError(f'{what}: not within {deadline.timeout:g} s')
        time.sleep(pause)
    return r

async def until(cond, timeout=20, what='condition'):
    """Let the event loop go on until `cond()`, which may be a coroutine, is true, and return what it returned;
    TimeoutError after `timeout` seconds"""
    deadline = Deadline(timeout)
    while True:
        if inspect.isawaitable(r := cond()): r = await r
        if r: return r
        if float(deadline.timer) > deadline.timeout and await asyncio.to_thread(deadline.passed):
            raise TimeoutError(f'{what}: not within {deadline.timeout:g} s')
        await asyncio.sleep(.02)

async def within(limit, attempt):
    """A bound in time that is promised: `await attempt()` gives fewer than `limit` seconds. One that is late may be an
    accident, but then neither of two more may be late, for as slow as the machine is before or after them."""
    if (first := await attempt()) < limit: return
    slow = await asyncio.to_thread(slowness)
    more = [await attempt(), await attempt()]
    slow = max(slow, await asyncio.to_thread(slowness))
    assert max(more) < limit*slow, (first, *more, slow)
