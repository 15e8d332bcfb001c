"""Write the published schemas anew."""

import msgspec

from unpoison.schemas import FOLDER, PUBLISHED, make_schema
from unpoison.storage import write_atomically

for name, kind in PUBLISHED.items():
    text = msgspec.json.format(msgspec.json.encode(make_schema(kind)), indent=2)
    write_atomically(FOLDER / f"{name}.json", text + b"\n")
