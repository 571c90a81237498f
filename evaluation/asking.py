"""Asking judges: the calls, their retries, the cache of raw answers, what must not be written down, and what it
will cost."""

import asyncio
import base64
import email.utils
import hashlib
import json
import os
import random
import time
import urllib.parse
from dataclasses import dataclass, field
from pathlib import Path

from tqdm import tqdm

from common.cli import fail

SHORTEST_SECRET = 4  # of less, a word of any answer would be struck out


@dataclass
class Endpoint:
    """A judge: the model's name, the address without user and password, and how to log in."""

    model: str
    url: str
    key: str = field(repr=False)
    basic: str = field(repr=False)  # user:password of the address, for HTTP's basic authentication, or ""
    secrets: tuple[str, ...] = field(repr=False)  # what no file and no line on the screen may hold

    def hide(self, text: str) -> str:
        """The text without keys and passwords, which a server may send back."""
        for secret in self.secrets:
            text = text.replace(secret, "***")
        return text


def make_endpoint(model: str, endpoint: str, key_variable: str) -> Endpoint:
    """The judge `model` at an address, with the key in an environment variable. Ends the run where the address
    is none."""
    parts = urllib.parse.urlsplit(endpoint)
    host = parts.netloc.rpartition("@")[2]
    user, _, password = parts.netloc.rpartition("@")[0].partition(":")
    url = urllib.parse.urlunsplit((parts.scheme, host, parts.path, "", ""))
    if parts.scheme not in ("http", "https") or not host:
        fail(f"--endpoint {url}: it begins with http:// or https://")
    if parts.query or parts.fragment:
        fail(f"--endpoint {url}: it must have no ? and no # part")
    key = os.environ.get(key_variable, "").strip()  # a line end is no part of it
    plain = urllib.parse.unquote(password)
    basic = ""
    if user or password:
        basic = f"{urllib.parse.unquote(user)}:{plain}"
    coded = base64.b64encode(basic.encode()).decode()
    long_enough = {text for text in (key, coded, password, plain) if len(text) >= SHORTEST_SECRET}
    # the longest first: a password may be a part of the key
    return Endpoint(model, url, key, basic, tuple(sorted(long_enough, key=len, reverse=True)))


def question_key(model: str, question: str | list[dict], sampling: dict) -> str:
    """The name of a question in the cache: other settings are another question."""
    return hashlib.sha256(json.dumps([model, question, sampling], sort_keys=True).encode()).hexdigest()


def messages_of(question: str | list[dict]) -> list[dict]:
    """A question as messages: a text is one message of the user."""
    if isinstance(question, str):
        return [{"role": "user", "content": question}]
    return question


def rough_tokens(text: str) -> float:
    """About as many tokens as a tokenizer would make: 4 characters of ASCII a token, 1 of any other script."""
    ascii_characters = sum(character.isascii() for character in text)
    return ascii_characters / 4 + len(text) - ascii_characters


def estimate(judge: Endpoint, questions: dict[str, str | list[dict]], known: dict, sampling: dict) -> str:
    """One line: what asking costs. `questions`: key -> question; `known`: the cache's answers."""
    unasked = [question for key, question in questions.items() if key not in known]
    tokens = sum(rough_tokens(m["content"]) for question in unasked for m in messages_of(question))
    limit = sampling.get("max_completion_tokens", sampling.get("max_tokens"))
    answers = "answers without a limit" if limit is None else f"answers of at most {limit} tokens each"
    if isinstance(limit, int):
        answers += f", {len(unasked) * limit:,} in all"
    cached = len(questions) - len(unasked)
    return (
        f"{judge.model}: {len(unasked)} questions to ask, {cached} in the cache; about {round(tokens):,} tokens "
        f"to read (roughly: 4 characters a token), {answers}"
    )


# --- the cache -----------------------------------------------------------------------------------------


def read_answers(file: Path) -> tuple[dict[str, tuple[str, str | None]], bool]:
    """(key -> (answer, finish reason), whether the last line is torn) of judgements.jsonl; none without a file."""
    text = file.read_text(encoding="utf-8", errors="replace") if file.exists() else ""
    answers = {}
    for line in text.split("\n"):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            answers[row["key"]] = (row["answer"], row["finish"])
        except (ValueError, TypeError, KeyError):
            pass
    return answers, bool(text) and not text.endswith("\n")


class Cache:
    """judgements.jsonl: each raw answer of the judge, a line appended and flushed as it comes. The last line
    of a key counts; what a kill left of a line is skipped."""

    def __init__(self, file: Path):
        self.answers, torn = read_answers(file)
        # Half a surrogate pair, which UTF-8 cannot hold, becomes JSON's \ud800. No `with`: the file stays
        # open until the command ends.
        self.file = open(file, "a", encoding="utf-8", errors="backslashreplace")  # noqa: SIM115 (open until `close`)
        if torn:
            self.file.write("\n")

    def add(self, key: str, **row) -> None:
        """Keeps one answer: `row` has `answer` and `finish`, and whatever else the file is to say."""
        self.answers[key] = (row["answer"], row["finish"])
        self.file.write(json.dumps({"key": key, **row}, ensure_ascii=False) + "\n")
        self.file.flush()


# --- the calls -----------------------------------------------------------------------------------------


class Failed(Exception):
    """A question is given up. `code` is the HTTP status, or 0 where the fault may pass or is the server's."""

    def __init__(self, why: str, code: int):
        super().__init__(why)
        self.code = code


def retry_after(headers) -> float:
    """Seconds that the server asks to wait, as a number or a date; 0 where it does not say."""
    value = headers.get("retry-after", "")
    try:
        return max(0.0, float(value))
    except ValueError:
        pass
    date = email.utils.parsedate_tz(value)
    if date is None:
        return 0.0
    return max(0.0, email.utils.mktime_tz(date) - time.time())


def completion(reply) -> tuple[str, str | None]:
    """(answer, finish reason) of a reply. Raises ValueError where it is none: the client passes on any JSON
    and any text that a server sends."""
    choices = getattr(reply, "choices", None) or [None]
    message = getattr(choices[0], "message", None)
    content = getattr(message, "content", 0)  # 0: there is none. None: an answer without text
    if not isinstance(content, (str, type(None))):
        raise ValueError(f"the reply is no chat completion: {reply}")
    return content or "", choices[0].finish_reason


class Asking:
    """Workers that take questions from one queue, and what they must know of each other."""

    # Statuses that say something of the question, too long for the judge, say. They do not stop the others,
    # but if nothing else was ever answered, the fault is not the question's.
    QUESTION_FAULTS = (400, 413, 422)
    # Statuses below 500 that are worth another try: timeout, conflict, too many requests.
    PASSING_FAULTS = (408, 409, 429)

    def __init__(self, client, judge: Endpoint, cache: Cache, sampling: dict, args, answered: bool):
        self.client = client
        self.judge = judge
        self.cache = cache
        self.sampling = sampling
        self.args = args  # --timeout, --tries, --backoff, --max-wait and --concurrency are read
        self.answered = answered  # whether the judge ever answered anything
        self.failed = {}  # key -> reason
        self.failures_in_a_row = 0
        self.stop = ""  # the reason why no more are asked
        self.not_before = 0.0  # the time (monotonic, in seconds) before which the server wants no question

    async def once(self, question: str | list[dict]) -> tuple[str, str | None]:
        """(answer, finish reason). Raises Failed, or OSError or ValueError for what is worth another try."""
        import openai  # not above: the other commands need no such package

        args = self.args
        try:
            # The limit is for all of it: the client's own is between two reads.
            async with asyncio.timeout(args.timeout):
                reply = await self.client.chat.completions.create(
                    model=self.judge.model,
                    messages=messages_of(question),
                    extra_body=self.sampling,
                )
        except TimeoutError:
            raise OSError(f"no answer within --timeout {args.timeout:g} s") from None
        except openai.APIConnectionError as error:
            raise OSError(f"no connection, {error.__cause__ or error!r}") from None
        except openai.APIStatusError as error:
            code = error.status_code
            why = f"HTTP {code}: {error.body or error.message}"
            wait = retry_after(error.response.headers)
            if wait > args.max_wait:
                too_long = f"asks to wait {wait:.0f} s, --max-wait is {args.max_wait:g}"
                raise Failed(f"{why} ({too_long})", 0) from None
            if code < 500 and code not in self.PASSING_FAULTS:
                raise Failed(why, code) from None
            self.not_before = max(self.not_before, time.monotonic() + wait)  # for all workers
            raise OSError(why) from None
        return completion(reply)

    async def ask(self, question: str | list[dict]) -> tuple[str, str | None]:
        """The same after at most `--tries` tries. The pauses between them grow and are random: a server that
        is too busy needs fewer questions, and not all at the same time. Raises Failed."""
        import openai

        args = self.args
        for attempt in range(args.tries):
            wait = self.not_before - time.monotonic()
            while wait > 0:
                await asyncio.sleep(wait)
                wait = self.not_before - time.monotonic()
            try:
                return await self.once(question)
            except (OSError, ValueError, openai.OpenAIError) as error:  # ValueError: also what is not JSON
                if self.stop or attempt == args.tries - 1:
                    raise Failed(f"{error} ({attempt + 1} tries)", 0) from None
            pause = min(args.max_wait, args.backoff * 2**attempt)
            await asyncio.sleep(pause * random.uniform(0.5, 1.0))

    def note_failure(self, key: str, failure: Failed) -> None:
        """Decides whether a failure is the question's own or ends the run."""
        # Hidden first, then cut: half a key is one, too.
        why = " ".join(self.judge.hide(str(failure)).split())[:300]  # one line
        self.failed[key] = why
        questions_own = failure.code in self.QUESTION_FAULTS
        if not (questions_own and self.answered):
            self.failures_in_a_row += 1
        refused = failure.code and not questions_own  # a wrong key or model, say: so are all others
        too_many = self.failures_in_a_row >= max(3, self.args.concurrency)
        if (refused or too_many) and not self.stop:
            self.stop = why

    async def worker(self, queue, bar: tqdm) -> None:
        """Takes (key, question) from the queue, which all workers share, until it is empty or the run stops."""
        for key, question in queue:
            try:
                answer, finish = await self.ask(question)
            except Failed as failure:
                self.note_failure(key, failure)
            else:
                self.cache.add(
                    key,
                    model=self.judge.model,
                    sampling=self.sampling,
                    prompt=question,
                    answer=self.judge.hide(answer),
                    finish=finish and self.judge.hide(str(finish)),
                )
                self.answered = True
                self.failures_in_a_row = 0
            bar.update()
            if self.stop:
                return


def ask_all(
    judge: Endpoint, questions: dict[str, str | list[dict]], cache: Cache, sampling: dict, args
) -> tuple[dict[str, str], str]:
    """Asks what the cache has no answer to, at most `--concurrency` questions at a time, each at most
    `--tries` times. `questions`: key -> question. Returns (key -> reason of those that failed, reason why no
    more were asked or "")."""
    try:
        import openai
    except ImportError:
        fail("evaluate.py judge needs the package: pip install openai")
    unasked = {key: question for key, question in questions.items() if key not in cache.answers}
    in_cache = len(questions) - len(unasked)
    headers = {}
    if judge.basic:  # not in the address, which the client would write into its errors
        headers["Authorization"] = "Basic " + base64.b64encode(judge.basic.encode()).decode()
    # Local servers need no key, but the client does.
    client = openai.AsyncOpenAI(
        base_url=judge.url,
        api_key=judge.key or "none",
        default_headers=headers,
        max_retries=0,
        timeout=None,
    )
    asking = Asking(client, judge, cache, sampling, args, answered=in_cache > 0)
    bar = tqdm(total=len(questions), initial=in_cache, desc=judge.model, disable=None)

    async def run() -> None:
        queue = iter(unasked.items())
        workers = min(args.concurrency, len(unasked))
        async with client:
            await asyncio.gather(*[asking.worker(queue, bar) for _ in range(workers)])

    stop = ""
    try:
        asyncio.run(run())
        stop = asking.stop
    except KeyboardInterrupt:
        stop = "interrupted"
    bar.close()
    return asking.failed, stop
