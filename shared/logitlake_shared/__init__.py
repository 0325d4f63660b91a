"""What both services use: the lake and the rules that teacher and student must share.

errors        one tree of errors
config        strict configuration trees from TOML and dotted overrides
spelling      which key somebody may have meant
alignment     which position predicts which token; decided here and nowhere else
rendering     how a conversation becomes prompt and response token ids
data_formats  LLaVA, OpenAI, RLAIF-V and Hugging Face datasets, streamed and checked
images        images under guard: loaded from where they may come, decoded in processes of their own
image_decoder checking and decoding one image, and the program of such a process
fetch         one image over https from an allowed host, with `public_addresses`
pixels        what a model makes of an image, by the checkpoint's own processor
topk          the top-k codec: grid, adaptive k, tail mass and what bounds it, stored error
draws         the other codec: counts of draws from the full distribution
store         objects in a folder, in memory or in an object store, behind one interface
durable       local files that are there whole or not at all
file_locks    who works in a file or folder alone
rows          samples, pairs and images in memory, and their Arrow tables
shards        rows <-> Parquet bytes
lake          caches, units, commit records, snapshots
cache_figures what a snapshot holds and what storing it cost, counted in one place
reader        datasets over one snapshot, the order of an epoch, batches, a loader
catalog       SQL over a lake, by DuckDB, and its published index
tools         inspect, stats, diff, verify, gc
doctor        whether this machine can do the work
cli_support   how the three command lines fail, show progress and take a configuration
cli           the `logitlake` command, with cli_care (verify, diff, gc, rebuild), cli_doctor and cli_output
"""
