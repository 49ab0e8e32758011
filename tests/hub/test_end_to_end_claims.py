"""What a published folder says of whole answers: it follows from its own counts, or `verify` refuses it."""

import json
import shutil

import pytest

from space_peft.demo import demo_model_path, load_demo_model
from space_peft.hub_cards import verify_erasure
from space_peft.hub_cards.certificate_checks import check_retained
from space_peft.hub_cards.load import attach_adapter
from space_peft.hub_cards.manifest import write_manifest
from space_peft.hub_cards.source import fetch
from space_peft.null_space.certificate import RetentionCertificate
from space_peft.records.folder import CERTIFICATE_NAME
from space_peft.retained.held_out import content_keys
from space_peft.retained.reading import RetainedRows


BASE = demo_model_path()


def with_certificate(published, folder, change):
    """A copy whose certificate is changed by a function, with a manifest that fits."""
    shutil.copytree(published, folder)
    content = json.loads((folder / CERTIFICATE_NAME).read_text())
    change(content)
    (folder / CERTIFICATE_NAME).write_text(json.dumps(content))
    write_manifest(folder)
    return verify_erasure(folder, base_model=BASE, canary=False)


def test_a_real_erasure_is_certified_by_image_and_counted_end_to_end(published, demo_erasure_data):
    certificate, retained = RetentionCertificate.load(published), RetainedRows(demo_erasure_data[1])
    fitted, held_out = certificate.held_out.split(retained)
    keys = content_keys(retained)
    assert certificate.held_out.groups == len(set(keys)) < len(retained)
    assert not {keys[row] for row in fitted} & {keys[row] for row in held_out}
    assert certificate.end_to_end.n == len({keys[row] for row in held_out}) > 5
    card = (published / "README.md").read_text()
    n, bound = certificate.end_to_end.n, certificate.end_to_end.share_bound
    assert f"**End to end**, which is what a user sees: of {n} answers" in card and bound < 1
    # The rows it was measured on are found again, and change as certified.
    model, processor = load_demo_model()
    check = check_retained(fetch(published), attach_adapter(fetch(published), model), retained, processor)
    assert check.status == "ok" and "the certificate's rows" in check.message


@pytest.mark.parametrize("key", ["share_bound", "log_prob_bound", "changed"])
def test_a_bound_that_does_not_follow_from_its_counts_is_refused(published, tmp_path, key):
    def better(content):
        content["end_to_end"][key] = (
            content["end_to_end"][key] / 2 if key != "changed" else 3 + content["end_to_end"][key]
        )

    report = with_certificate(published, tmp_path / "copy", better)
    assert {check.file for check in report.failed} == {CERTIFICATE_NAME} and report.exit_code == 1


def test_a_calibration_that_its_answers_do_not_show_is_refused(published, tmp_path):
    calibration = {
        "risk": 0.05,
        "delta": 0.05,
        "scale": 1.0,
        "images": 100,
        "texts": 0,
        "scales": [0.5, 1.0],
        "left_out": 0,
    }
    good = {**calibration, "changed": [0, 1]}

    def set_calibration(content):
        content["calibration"] = good

    assert not with_certificate(published, tmp_path / "good", set_calibration).failed
    good = {**calibration, "changed": [0, 9]}
    report = with_certificate(published, tmp_path / "bad", set_calibration)
    assert {check.file for check in report.failed} == {CERTIFICATE_NAME}
