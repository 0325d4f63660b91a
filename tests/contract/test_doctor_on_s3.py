"""`logitlake doctor` on a real S3 server: what it tries, what it leaves, what it says of a bucket that is not there."""

from logitlake_shared.doctor.storage import storage_checks
from logitlake_shared.lake import Lake
from logitlake_shared.store import open_store


def test_a_bucket_is_tried_and_left_as_it_was(s3_bucket: str) -> None:
    """Before there is a lake, and after."""
    lake = f"s3://{s3_bucket}/lake"
    for expected in ([], ["lake.json"]):
        found = {check.name: check for check in storage_checks(lake)}
        assert list(found) == ["lake", "write", "create once", "replace", "clock"]
        assert {check.status for check in found.values()} == {"ok"}
        assert "agrees with the storage" in found["clock"].detail
        assert open_store(lake).names("") == expected
        Lake.create(lake)


def test_a_bucket_that_is_not_there_is_blocked(s3_bucket: str) -> None:
    found = {check.name: check for check in storage_checks("s3://no-such-bucket/lake")}
    assert [name for name, check in found.items() if check.status == "blocked"] == ["write"]
    assert "Debug source" not in found["write"].detail
