"""From a file to events: JSON lines, CSV and access logs, in batches, exactly once.

Every event has an idempotency key. One that the input does not give is `<source>:<line>:<event type>`, the source
being the file's name without directory and ".gz" unless --source says otherwise. So a file may be imported again,
zipped or not, and after it has grown at its end; a rotated or edited file is other data and needs another source,
or the server calls its lines conflicts (or, where they are equal, duplicates). A file may be read while it grows:
a last line that is not whole is no event yet, and no fault. (A JSON object ends by itself, an access log's line has
all that we take of it before its last field, so these two are whole where they can be read; only a CSV row needs its
line end for that.)

source      opens what is given: a file, gzip, standard input
records     what a line becomes: events, or what is wrong with it
jsonl, csv_rows, access_log    one format each; pure
formats     tells them apart
batches     collects events, and sends several batches at once
"""
