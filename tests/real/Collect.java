import java.nio.ByteBuffer;
import java.nio.file.*;
import java.util.*;
import java.util.concurrent.*;
import java.util.concurrent.atomic.AtomicLong;

/**
 * Threads that make garbage and keep a part of it, in rounds, until the file {@code go} is there
 * (or for $STEPS rounds). A round's sum depends on its number alone.
 */
class Collect {
    static final int THREADS = 4;
    static final int KEPT = 4000;
    final Map<Integer, byte[]> kept = new ConcurrentHashMap<>();
    final AtomicLong tasks = new AtomicLong();
    final ByteBuffer direct = ByteBuffer.allocateDirect(1 << 20);

    /** What was kept under a key tells its key and its round. */
    static byte[] make(int key, int round) {
        byte[] b = new byte[600 + key % 300];
        for (int i = 0; i < b.length; i++) b[i] = (byte) (key * 31 + round * 7 + i);
        return b;
    }

    long work(int who, int round) {
        tasks.incrementAndGet();
        long sum = 0;
        for (int i = 0; i < 100; i++) {
            int key = (round * 100 + i) % (KEPT / THREADS) * THREADS + who;
            byte[] old = kept.put(key, make(key, round));
            if (old != null && !Arrays.equals(old, make(key, round - KEPT / THREADS / 100)))
                throw new IllegalStateException("what was kept under " + key + " has changed");
            byte[] fresh = new byte[20_000];
            for (byte b : fresh) if (b != 0) throw new IllegalStateException("a new array is not zero");
            fresh[i] = 1;
            sum = sum * 31 + key + fresh[i];
        }
        return sum;
    }

    public static void main(String[] args) throws Exception {
        new Collect().run(Integer.parseInt(System.getenv().getOrDefault("STEPS", "0")));
    }

    void run(int steps) throws Exception {
        for (int i = 0; i < direct.capacity(); i++) direct.put(i, (byte) (i * 13));
        ExecutorService pool = Executors.newFixedThreadPool(THREADS);
        ScheduledExecutorService clock = Executors.newScheduledThreadPool(1);
        AtomicLong ticks = new AtomicLong();
        clock.scheduleAtFixedRate(ticks::incrementAndGet, 1, 1, TimeUnit.MILLISECONDS);
        Path go = Path.of("go"), progress = Path.of("progress");
        long sum = 0;
        int count = 0;
        while (steps > 0 ? count != steps : !Files.exists(go)) {
            int round = ++count;
            List<Future<Long>> parts = new ArrayList<>();
            for (int who = 0; who < THREADS; who++) {
                int me = who;
                parts.add(pool.submit(() -> work(me, round)));
            }
            for (Future<Long> part : parts) sum = sum * 1_000_003 + part.get();
            if (count % 50 == 0) System.gc();
            Files.writeString(progress, count + " " + sum + "\n", StandardOpenOption.CREATE, StandardOpenOption.APPEND);
            Thread.sleep(2);
        }
        pool.shutdown();
        if (!pool.awaitTermination(60, TimeUnit.SECONDS)) throw new IllegalStateException("the pool hangs");
        long then = ticks.get();
        while (ticks.get() == then) Thread.sleep(1);
        clock.shutdownNow();
        for (int i = 0; i < direct.capacity(); i++)
            if (direct.get(i) != (byte) (i * 13)) throw new IllegalStateException("direct memory, byte " + i);
        if (tasks.get() != (long) count * THREADS) throw new IllegalStateException("tasks " + tasks);
        TreeMap<Integer, byte[]> sorted = new TreeMap<>(kept);
        for (Map.Entry<Integer, byte[]> e : sorted.entrySet()) sum = sum * 31 + Arrays.hashCode(e.getValue());
        Files.writeString(Path.of("out"), sorted.size() + " " + sum + "\n");
        Files.writeString(Path.of("count"), count + "\n");
        if (new String(Files.readAllBytes(Path.of("/proc/self/stat"))).isEmpty()) throw new IllegalStateException();
    }
}
