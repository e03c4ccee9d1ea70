"""The whole: an untouched language model with its eyes and ears beside it.

Composition without wrapping: `.lm` is exactly a text `Llama`; encoders and adapters are its siblings and meet it only in `hidden`,
where the adapters run between its layers, and in `embed`, where speech takes the place of token embeddings. A call without
media runs the language model and nothing else.

Shape letters: B rows, T tokens of this call, D LM width, P pictures (or frames), V clips, A recordings, U embeddings of a
recording, K audio tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lm.chat import chat_format
from lm.checkpoint import load_llama
from lm.features import LayerTap
from lm.model import Adapters, KVCache, Llama, NewTokenRows, token_positions
from lm.tokenizer import Tokenizer
from mm.config import MultimodalConfig
from mm.hearing import what_was_said
from mm.processor import Batch, Processor
from speech.adapter import SpeechAdapter
from speech.conformer import Conformer
from speech.readout import NOTHING, TokenReadout, as_written
from speech.streaming import below
from speech.voice import Voice
from video.adapter import VideoAdapter
from video.clips import encode_frames
from vision.adapter import CrossMemory, ImageAdapter, chain_adapters
from vision.encoder import ImageEncoder

if TYPE_CHECKING:
    from mm.generate import Event, Generation
    from mm.speaking import Speech


@dataclass(frozen=True)
class Media:
    """A batch's media as the language model takes them.

    Attributes:
        pictures: keys and values of the pictures; None without pictures.
        clips: likewise of the clips.
        speech_KD: embeddings of all audio tokens, in reading order; None without recordings.
        silent_BT: audio tokens of the batch that are passed over; None where all are heard.
    """

    pictures: CrossMemory | None = None
    clips: CrossMemory | None = None
    speech_KD: Tensor | None = None
    silent_BT: Tensor | None = None


NO_MEDIA = Media()


class MultimodalLlama(nn.Module):
    """A Llama-family language model that can be asked about pictures and clips, spoken to, and listened to.

    Args:
        config: the language model and the parts beside it.
        tokenizer: None where the checkpoint came without one; `forward` works, `generate` does not.
        lm: the language model, when it is loaded already; a new one otherwise.
    """

    def __init__(self, config: MultimodalConfig, tokenizer: Tokenizer | None = None, lm: Llama | None = None) -> None:
        super().__init__()
        self.config = config
        self.tokenizer = tokenizer
        self.lm = Llama(config.lm) if lm is None else lm
        self.new_tokens = NewTokenRows(config.n_new_tokens, config.lm.dim) if config.n_new_tokens else None
        self.image_encoder = ImageEncoder(config.image.encoder) if config.image else None
        self.image_adapter = ImageAdapter(config.image.adapter) if config.image else None
        self.speech_encoder = Conformer(config.speech.encoder) if config.speech else None
        self.speech_adapter = SpeechAdapter(config.speech.adapter) if config.speech else None
        self.video_adapter = VideoAdapter(config.video.adapter) if config.video else None
        #: Speaks; no part of the module, so that stages neither train nor cast it.
        self.voice: Voice | None = None

    @classmethod
    def from_pretrained(
        cls,
        source: str | Path,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> MultimodalLlama:
        """Loads a model.

        Args:
            source: "bundled", "debug", a directory (ours, Hugging Face's or Meta's layout), a Hub repository or a .gguf file.
            dtype: of all weights; FP32 when None.
            device: CPU when None.

        Raises:
            ValueError: the source is not found, or its tensors do not fit; says which.
        """
        from mm.checkpoint import from_pretrained  # the loader builds this class

        return from_pretrained(source, dtype=dtype, device=device)

    def save_pretrained(self, directory: str | Path) -> None:
        """Writes a directory that `from_pretrained` reads."""
        from mm.checkpoint import save_pretrained

        save_pretrained(self, directory)

    @property
    def processor(self) -> Processor:
        """Turns messages into batches for this model.

        Raises:
            ValueError: the checkpoint came without a tokenizer.
        """
        if self.tokenizer is None:
            raise ValueError(
                "this checkpoint has no tokenizer; put its tokenizer.json or tokenizer.model into the directory"
            )
        config = self.config
        chat = chat_format(config.chat, self.tokenizer, config.media_ids)
        return Processor(chat, config.image.encoder if config.image else None, config.speech, config.video)

    @property
    def device(self) -> torch.device:
        return self.lm.embed_tokens.weight.device

    def trainable_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Names and parameters that the current stage trains."""
        return ((name, p) for name, p in self.named_parameters() if p.requires_grad)

    def swap_lm(self, source: str | Path) -> None:
        """Replaces the language model by another of the same shape, such as a base model by its instruct version (7.5.2).

        Raises:
            ValueError: the shapes differ.
        """
        weight = self.lm.embed_tokens.weight
        other = load_llama(source, dtype=weight.dtype, device=weight.device)
        if other.config != self.config.lm:
            raise ValueError(
                f"swap_lm: {source} has another shape than this model's language model:\n{other.config}\n{self.config.lm}"
            )
        trains = weight.requires_grad
        self.lm = other.requires_grad_(trains)
        self.config = replace(self.config, lm_source=str(source))  # else save_pretrained would name the old one

    def swap_image(self, source: str | Path) -> None:
        """Replaces the image part by another model's of the same shape, such as a finetuned one (7.5.2).

        The tiles may be larger; frames of clips take on their size.

        Raises:
            ValueError: the shapes differ, or one of the models has no image part.
        """
        other = MultimodalLlama.from_pretrained(source, device=self.device)
        ours, theirs = self.config.image, other.config.image
        if not (
            ours
            and theirs
            and theirs == replace(ours, encoder=replace(ours.encoder, tile_size=theirs.encoder.tile_size))
        ):
            raise ValueError(f"swap_image: {source} has another image part than this model:\n{theirs}\n{ours}")
        self.resize_tiles(theirs.encoder.tile_size)
        self.image_encoder, self.image_adapter = other.image_encoder, other.image_adapter
        if self.new_tokens is not None and other.new_tokens is not None:
            with torch.no_grad():
                rows, their_rows = self.config.new_token_rows("image"), other.config.new_token_rows("image")
                self.new_tokens.weight[list(rows)] = other.new_tokens.weight[list(their_rows)]

    def resize_tiles(self, tile_size: int) -> None:
        """Changes the size of the tiles of pictures and frames, as annealing does (7.4); positions are interpolated."""
        if self.image_encoder is None or self.config.image is None:
            raise ValueError("tile_size: this model has no image encoder")
        if tile_size == self.config.image.encoder.tile_size:
            return
        self.image_encoder.resize(tile_size)
        image = replace(self.config.image, encoder=self.image_encoder.config)
        self.config = replace(self.config, image=image)
        if self.video_adapter is not None and self.config.video is not None:
            self.video_adapter.resize(self.image_encoder.config.grid_size)
            self.config = replace(self.config, video=replace(self.config.video, adapter=self.video_adapter.config))

    def change_frames(self, max_frames: int | None = None, factor: int | None = None) -> None:
        """Changes how many frames a clip has at most, and how many become one, as finetuning does (7.5.2)."""
        video = self.config.video
        if self.video_adapter is None or video is None:
            raise ValueError("max_frames, factor: this model has no video part")
        if factor is not None:
            self.video_adapter.regroup(factor)
        max_frames = video.max_frames if max_frames is None else max_frames
        self.config = replace(
            self.config, video=replace(video, adapter=self.video_adapter.config, max_frames=max_frames)
        )

    def encode_media(self, batch: Batch) -> Media:
        """Runs the encoders, once for each medium."""
        return Media(self.encode_pictures(batch), self.encode_clips(batch), *self.encode_speech(batch))

    def encode_pictures(self, batch: Batch) -> CrossMemory | None:
        """Every cross-attention block's keys and values of the batch's pictures; None without pictures."""
        if batch.pictures is None:
            return None
        if self.image_encoder is None or self.image_adapter is None:
            raise ValueError("image: this model has no image part")
        features_PNLF = self.image_encoder(batch.pictures)
        return self.image_adapter.memory(
            features_PNLF,
            batch.pictures,
            row_P=batch.picture_row_P,
            position_P=batch.picture_position_P,
            n_rows=batch.ids_BT.shape[0],
        )

    def encode_clips(self, batch: Batch) -> CrossMemory | None:
        """Likewise of the batch's clips, whose frames are encoded as pictures are, a few at a time."""
        if batch.clips is None:
            return None
        if self.image_encoder is None or self.video_adapter is None:
            raise ValueError("video: this model has no video part")
        features_PNLF = batch.frame_features_PNLF
        if features_PNLF is None:
            features_PNLF = encode_frames(self.image_encoder, batch.clips.frames)
        return self.video_adapter.memory(
            features_PNLF,
            batch.clips,
            row_V=batch.clip_row_V,
            position_V=batch.clip_position_V,
            n_rows=batch.ids_BT.shape[0],
        )

    def encode_speech(self, batch: Batch) -> tuple[Tensor | None, Tensor | None]:
        """Embeddings `(K, D)` of the batch's audio tokens, in reading order, and which tokens `(B, T)` are passed over.

        None without recordings; the latter also where all of them are heard, as they are without a readout.
        """
        if batch.mel_ATM is None or batch.n_frames_A is None:
            return None, None
        if self.speech_encoder is None or self.speech_adapter is None:
            raise ValueError("audio: this model has no speech part")
        x_AUD, n_tokens_A = self.speech_adapter(*self.speech_encoder(batch.mel_ATM, batch.n_frames_A))
        readout, table_VD = self.speech_adapter.readout, self.lm.embed_tokens.weight
        if readout is None:
            return x_AUD[below(n_tokens_A, x_AUD.shape[1])], None
        heard_AUD, token_AU = readout(x_AUD, table_VD)
        with torch.no_grad():
            log_probs_AUK, symbols_AUK = readout.likely(x_AUD, table_VD)
        chat, token_ids = self.processor.chat, readout.token_ids.tolist()
        start_id = chat.tokenizer.special_tokens[chat.text_start]
        heard, tokens = [], []
        for a, n in enumerate(n_tokens_A.tolist()):
            likely = log_probs_AUK[a, :n], symbols_AUK[a, :n]
            text = what_was_said(self.lm, chat.tokenizer, start_id, *likely, token_ids)
            heard_UD, token_U = as_written(heard_AUD[a, :n], token_AU[a, :n], text, table_VD)
            heard.append(heard_UD)
            tokens.append(token_U)
        silent_BT = torch.zeros_like(batch.valid_BT)
        silent_BT[batch.ids_BT == self.config.media_ids["audio"]] = torch.cat(tokens) == NOTHING
        return torch.cat(heard), silent_BT

    def read_speech(self, token_ids: Sequence[int]) -> None:
        """From now on, hears speech as mixtures of these tokens (`speech.readout`); what the ears have learnt stays.

        Raises:
            ValueError: there is no speech part.
        """
        adapter, speech = self.speech_adapter, self.config.speech
        if adapter is None or speech is None:
            raise ValueError("read_speech: this model has no speech part")
        table_VD = self.lm.embed_tokens.weight
        if adapter.readout is None:
            adapter.readout = TokenReadout(adapter.config.lm_dim, len(token_ids)).to(table_VD)
            adapter.readout.start(token_ids, table_VD)
        else:
            adapter.readout.retoken(token_ids)
        adapter.config = replace(adapter.config, n_readout=len(token_ids))
        self.config = replace(self.config, speech=replace(speech, adapter=adapter.config))

    def adapters(self, media: Media, position_BT: Tensor) -> Adapters:
        """What runs between the layers of the language model for tokens at these positions; clips before pictures (7.2)."""
        seen = ((self.video_adapter, media.clips), (self.image_adapter, media.pictures))
        return chain_adapters(
            *(
                adapter.bind(memory, position_BT)
                for adapter, memory in seen
                if adapter is not None and memory is not None
            )
        )

    def embed(self, ids_BT: Tensor, speech_KD: Tensor | None = None) -> Tensor:
        """Embeddings of tokens; `speech_KD` are those of the audio tokens among them, in reading order."""
        if self.new_tokens is None:
            return self.lm.embed_tokens(ids_BT)
        h_BTD = self.new_tokens(ids_BT, self.lm.embed_tokens)
        if speech_KD is None:
            return h_BTD
        return h_BTD.index_put((ids_BT == self.config.media_ids["audio"],), speech_KD.to(h_BTD.dtype))

    def decode(
        self,
        ids_BT: Tensor,
        *,
        valid_BS: Tensor | None = None,
        media: Media = NO_MEDIA,
        cache: KVCache | None = None,
        tap: LayerTap | None = None,
    ) -> Tensor:
        """Decoder output `(B, T, D)` of tokens that may continue a cached beginning.

        Args:
            ids_BT: the new tokens.
            valid_BS: False where a row has padding, over cached and new tokens; None when there is none.
            media: pictures and clips that the tokens may look at, and the embeddings of the audio tokens among them.
            cache: earlier tokens; these are added.
            tap: keeps what one of the layers puts out.
        """
        h_BTD = self.embed(ids_BT, media.speech_KD)
        past = cache.length if cache is not None else 0
        position_BT = token_positions(h_BTD, valid_BS, past)
        if valid_BS is not None:
            position_BT = torch.where(valid_BS[:, past:], position_BT, -1)  # padding sees nothing
        if media.silent_BT is not None:  # to the language model, silence is as padding; where pictures are, it counts
            n_later = past + ids_BT.shape[1] - media.silent_BT.shape[1]
            heard_BS = ~F.pad(media.silent_BT, (0, n_later))
            valid_BS = heard_BS if valid_BS is None else valid_BS & heard_BS
        adapters = self.adapters(media, position_BT)
        if tap is not None:
            adapters = tap.over(adapters)
        return self.lm.hidden(h_BTD, valid_BS=valid_BS, cache=cache, adapters=adapters)

    def hidden(self, batch: Batch) -> Tensor:
        """Normalised decoder output `(B, T, D)` of whole rows; `self.lm.logits` makes logits of it."""
        return self.decode(batch.ids_BT, valid_BS=batch.valid_BS, media=self.encode_media(batch))

    def forward(self, batch: Batch) -> Tensor:
        """Logits `(B, T, vocab_size)`."""
        return self.lm.logits(self.hidden(batch))

    def generate(self, prompt: str | list[str] | None = None, **kwargs: Any) -> Generation | list[Generation]:
        """Answers a prompt, with media beside it; see `mm.generate.generate`."""
        from mm.generate import generate

        return generate(self, prompt, **kwargs)

    def stream(self, prompt: str | list[dict[str, Any]] | None = None, **kwargs: Any) -> Iterator[Event]:
        """Answers as it is made; see `mm.generate.stream`."""
        from mm.generate import stream

        return stream(self, prompt, **kwargs)

    def speak(self, text: str) -> Speech:
        """Says a text; see `mm.speaking.speak`."""
        from mm.speaking import speak

        return speak(self, text)
