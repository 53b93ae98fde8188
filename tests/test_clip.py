"""Words: the tokenizer, CLIP's loss with shared prompts, the text encoder, and the folder they lie in."""

import pytest
import torch
import torch.nn.functional as F
from transformers import CLIPModel, CLIPTokenizer

from diffecho_utils import checkpoints, data, models, objectives, prompts


@pytest.fixture(scope="module")
def tokenizer():
    return models.build_tokenizer(prompts.every())


@pytest.fixture
def clip(smoke, tokenizer):
    torch.manual_seed(0)
    return models.build_clip(smoke, tokenizer).eval()


@pytest.fixture
def folder(clip, tokenizer, tmp_path):
    checkpoints.save([("", clip), ("", tokenizer)], tmp_path / "clip", {"model": "clip"})
    return tmp_path / "clip"


def test_words_of_the_templates_are_one_token_and_any_other_can_be_spelled(tokenizer):
    pieces = [piece for word in prompts.vocabulary() for piece in word.split("-")]
    split = {piece: tokenizer.tokenize(piece) for piece in pieces}
    assert all(len(tokens) == 1 for tokens in split.values()), split
    for text in ("hypertrophic", "zzxqj", "naïve", "心", "EF < 35 %"):
        ids = tokenizer(text).input_ids
        assert (ids[0], ids[-1]) == (tokenizer.bos_token_id, tokenizer.eos_token_id)
        assert tokenizer.eos_token_id not in ids[1:-1], f"{text}: a piece is unknown"
        spelled = tokenizer.decode(ids, skip_special_tokens=True)
        assert spelled.replace(" ", "") == text.lower().replace(" ", "")
    again = models.build_tokenizer(reversed(prompts.every()))
    assert again.get_vocab() == tokenizer.get_vocab(), "the same texts in another order"


def test_prompts_fit_and_case_does_not_matter(tokenizer):
    ids = models.tokens(tokenizer, prompts.every())
    assert ids.shape == (len(prompts.every()), models.TOKENS)
    assert (ids[:, -1] == tokenizer.eos_token_id).all(), "the longest prompt is cut short"
    assert len(ids.unique(dim=0)) == len({text.lower() for text in prompts.every()})
    upper = models.tokens(tokenizer, [text.upper() for text in prompts.every()])
    assert torch.equal(ids, upper)


def test_shared_prompts_share_the_targets(clip, tokenizer, frames):
    """The loss written out as sums over the frames that a prompt fits."""
    texts, ids = data.prompt_table(frames, ("paper",))
    objective = objectives.ContrastiveObjective(clip, models.tokens(tokenizer, texts))
    n = 12
    images, masks, ids = frames.images[:n], frames.masks[:n], ids[:n]
    wording = torch.arange(n) % prompts.WORDINGS
    drawn = torch.zeros(n, 6)
    loss, _ = objective(images, masks, ids, drawn, wording)
    moved, _ = data.jitter(images, masks, drawn)
    chosen = ids[torch.arange(n), wording]
    logits = clip(input_ids=objective.tokens[chosen], pixel_values=moved).logits_per_image
    expected = 0
    for i in range(n):
        fitting = [j for j in range(n) if frames.classes[i] == frames.classes[j]]
        assert len(fitting) == n // 4  # the paper's prompt says the class and nothing else
        expected -= F.log_softmax(logits[i], 0)[fitting].mean() / n / 2
        expected -= F.log_softmax(logits[:, i], 0)[fitting].mean() / n / 2
    torch.testing.assert_close(loss, expected)


def test_distinct_prompts_give_the_loss_of_clip(clip, tokenizer, frames):
    texts = [f"patient {i}" for i in range(8)]
    objective = objectives.ContrastiveObjective(clip, models.tokens(tokenizer, texts))
    images, masks, drawn = frames.images[:8], frames.masks[:8], torch.zeros(8, 6)
    ids, wording = torch.arange(8)[:, None], torch.zeros(8, dtype=torch.int64)
    loss, _ = objective(images, masks, ids, drawn, wording)
    moved, _ = data.jitter(images, masks, drawn)
    stock = clip(input_ids=objective.tokens, pixel_values=moved, return_loss=True)
    torch.testing.assert_close(loss, stock.loss)


def test_text_encoder_gives_token_states(folder, smoke):
    encoder = checkpoints.load_text_encoder(folder)
    states = encoder(["", "two-chamber view", "two-chamber heart", "Two-Chamber View"])
    assert states.shape == (4, models.TOKENS, smoke.clip_width)
    assert states.dtype == torch.float32 and not states.requires_grad
    torch.testing.assert_close(states[1], states[3])
    common = 4  # beginning, two, -, chamber
    torch.testing.assert_close(states[1, :common], states[2, :common])  # causal: no look ahead
    assert (states[1, common:] - states[2, common:]).abs().amax(1).min() > 1e-4
    torch.testing.assert_close(encoder(["two-chamber view"])[0], states[1], atol=1e-5, rtol=1e-4)


def test_stock_transformers_loads_the_folder(folder, clip, tokenizer):
    stock = CLIPModel.from_pretrained(folder, local_files_only=True, dtype=torch.float32).eval()
    words = CLIPTokenizer.from_pretrained(folder, local_files_only=True)
    texts = ["apical four-chamber view at end-systole", "hypertrophic"]
    whole = {"padding": "max_length", "max_length": models.TOKENS, "return_tensors": "pt"}
    ids, side = words(texts, **whole).input_ids, clip.config.vision_config.image_size
    assert torch.equal(ids, models.tokens(tokenizer, texts))
    pixels = torch.zeros(2, 1, side, side)
    with torch.no_grad():
        theirs, ours = (m(input_ids=ids, pixel_values=pixels) for m in (stock, clip))
    for name in ("text_embeds", "image_embeds"):
        torch.testing.assert_close(theirs[name], ours[name], atol=5e-3, rtol=0)
