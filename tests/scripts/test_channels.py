"""The script that looks for channels with most of the energy finds one that was put there."""

from conftest import save_toy, write_recipe
from safetensors.torch import load_file, save_file


def test_a_channel_that_dwarfs_the_others_is_found(tmp_path, script):
    toy = save_toy(tmp_path / "toy")

    def shares() -> list[float]:
        recipe = write_recipe(tmp_path / "r.yaml", toy, tmp_path / "run")
        done = script("channels", "--recipe", recipe)
        assert done.code == 0, done.err
        lines = done.out.splitlines()
        assert len(lines) == 4
        return [float(line.split("share ")[1].split()[0]) for line in lines[:-1]]

    assert max(shares()) < 0.3
    weights = load_file(toy / "model.safetensors")
    for name, weight in weights.items():
        if name.endswith("down_proj.weight"):
            weight[3] *= 100
    save_file(weights, toy / "model.safetensors", {"format": "pt"})
    assert min(shares()) > 0.9
