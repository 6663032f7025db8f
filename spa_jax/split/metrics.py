"""The Prometheus metrics of a cloud; neither prompts nor activations are among them."""

from prometheus_client import Counter, Gauge, Histogram

SESSIONS = Gauge("spa_sessions", "Generations under way or lingering.")
TOKENS = Counter("spa_tokens", "New tokens of finished generations.")
EXCHANGES = Counter("spa_exchanges", "Questions asked of devices.")
DEGRADED = Counter("spa_degraded_tokens", "Tokens chosen without an answer that was wanted.")
UNCORRECTED_PROMPTS = Counter("spa_uncorrected_prompts", "Prompts not corrected for want of an answer.")
DROPPED = Counter("spa_dropped_messages", "Messages that came late, twice, or made no sense.")
BYTES_DOWN = Counter("spa_bytes_down", "Bytes sent to devices.")
BYTES_UP = Counter("spa_bytes_up", "Bytes received from devices.")
SECONDS_TO_FIRST_TOKEN = Histogram("spa_seconds_to_first_token", "From opening, the prompt's run included.")
SECONDS_PER_EXCHANGE = Histogram("spa_seconds_per_exchange", "From a question to its answer, or to the deadline.")
SECONDS_PER_TOKEN = Histogram("spa_seconds_per_token", "Of a generation, from its opening to its end.")
