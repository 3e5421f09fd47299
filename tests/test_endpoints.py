"""What an endpoint does when a server answers late, wrongly, or not at all: a real one on loopback."""

from __future__ import annotations

import json
import logging
import threading
import traceback

import pytest
from stub_server import StubServer, prompt_text

from dentalgemma.evaluation.endpoints import Endpoint, EndpointClosed, EndpointError, open_endpoint
from dentalgemma.evaluation.questions import EvaluationError

HELLO = [{"role": "user", "content": "Hello"}]
CANARY = "sk-canary-5f1c9b7e42"


def ask(server: StubServer, messages=HELLO, *, api="openai", system=None, parameters=None, **options):
    options = {"backoff": 0.01, "timeout": 10} | options
    with Endpoint(server.url, "stub", api=api, **options) as endpoint:
        return endpoint.complete(messages, system=system, **(parameters or {}))


@pytest.mark.parametrize("api", ["openai", "anthropic"])
def test_both_apis_answer_and_count_tokens(api):
    with StubServer(answer="two words") as server:
        reply = ask(server, api=api, system="Be brief.", parameters={"temperature": 0, "max_tokens": 8})

    assert reply.text == "two words" and reply.finish_reason == "stop" and reply.model == "stub"
    assert reply.usage["output_tokens"] == 2 and reply.usage["input_tokens"] > 0
    assert reply.attempts == 1 and prompt_text(server.requests[0]) == "Be brief.\nHello"
    assert server.requests[0]["temperature"] == 0 and server.requests[0]["max_tokens"] == 8


@pytest.mark.parametrize(
    "failure", ["429", "500", "503", "520", "524", "529", "truncated", "broken_json", "dropped", "no_choices"], ids=str
)
@pytest.mark.parametrize("api", ["openai", "anthropic"])
def test_what_may_pass_is_tried_again_with_identical_parameters(failure, api):
    with StubServer([failure, failure, "text"]) as server:
        reply = ask(server, api=api, parameters={"temperature": 0, "seed": 0})

    assert reply.attempts == 3 and reply.text
    assert server.requests[0] == server.requests[1] == server.requests[2]


@pytest.mark.parametrize("lateness", ["slow", "dripping"])
def test_a_late_answer_is_tried_again_even_when_bytes_keep_coming(lateness):
    with StubServer([lateness, "text"], delay=1.5) as server:
        reply = ask(server, timeout=0.4)

    assert reply.attempts >= 2 and reply.seconds >= 0.4


def test_after_the_last_retry_the_error_says_what_failed():
    with StubServer(["500"]) as server, pytest.raises(EndpointError, match=r"3 tries.*status 500: made-up") as caught:
        ask(server, retries=2)

    assert len(server.requests) == 3 and caught.value.status == 500
    assert isinstance(caught.value, EvaluationError) and caught.value.exit_code == 2


def test_a_server_that_is_not_there_is_an_error_without_status():
    with StubServer() as server:
        url = server.url
    with Endpoint(url, "stub", retries=1, backoff=0.01) as endpoint, pytest.raises(EndpointError) as caught:
        endpoint.complete(HELLO)

    assert caught.value.status is None and "ConnectError" in str(caught.value)


def test_retry_after_goes_before_the_own_wait():
    with StubServer(["429:0.3", "text"]) as server:
        reply = ask(server, backoff=60)

    assert 0.3 <= reply.seconds < 30


def test_a_server_that_asks_for_no_wait_is_given_the_own_one():
    with StubServer(["429:0", "text"]) as server:
        reply = ask(server, backoff=0.2)

    assert reply.seconds >= 0.2


@pytest.mark.parametrize(("drawn", "longer"), [(0.0, 1.0), (1.0, 1.25)])
def test_waits_double_and_are_longer_by_a_random_part(drawn, longer):
    with StubServer(["503", "503", "503", "text"]) as server:
        reply = ask(server, backoff=0.05, jitter=lambda: drawn)

    assert reply.seconds >= (0.05 + 0.1 + 0.2) * longer


@pytest.mark.parametrize(
    ("status", "remedy"), [(401, "wants a key"), (403, "wants a key"), (404, "check the URL"), (418, "was refused")]
)
def test_what_no_retry_can_mend_fails_at_once_with_a_remedy(status, remedy):
    with StubServer([str(status)]) as server, pytest.raises(EndpointError, match=remedy) as caught:
        ask(server)

    assert len(server.requests) == 1 and caught.value.status == status


def test_a_quota_that_is_spent_is_not_waited_for():
    with (
        StubServer(["insufficient_quota"]) as server,
        pytest.raises(EndpointError, match="exceeded your quota"),
    ):
        ask(server)

    assert len(server.requests) == 1


def test_an_empty_answer_is_an_answer():
    with StubServer(["empty"]) as server:
        assert ask(server).text == "" and ask(server, api="anthropic").text == ""


@pytest.mark.parametrize("name", ["seed", "temperature"])
def test_a_refused_parameter_is_left_out_and_told(name):
    wanted = {"seed": 0, "temperature": 0, "max_tokens": 8}
    with StubServer([f"refuses:{name}"]) as server, Endpoint(server.url, "stub", retries=0) as endpoint:
        first, second = endpoint.complete(HELLO, **wanted), endpoint.complete(HELLO, **wanted)

    assert first.requested == second.requested == wanted
    assert first.honoured == second.honoured == {key: value for key, value in wanted.items() if key != name}
    assert first.attempts == 2 and second.attempts == 1, "refused once, it is not asked for again"
    assert len(server.requests) == 3


def test_reasoning_models_get_their_limit_under_its_new_name():
    with StubServer(["refuses:max_tokens"]) as server:
        reply = ask(server, parameters={"max_tokens": 8})

    assert reply.requested == {"max_tokens": 8} and reply.honoured == {"max_completion_tokens": 8}


def refusal(message: str, parameter: object = None) -> str:
    return "raw:400:" + json.dumps({"error": {"message": message, "param": parameter}})


FASTAPI = '{"detail": [{"type": "extra_forbidden", "loc": ["body", "seed"], "msg": "Extra inputs are not permitted"}]}'
GOOGLE = r'[{"error": {"code": 400, "message": "Unknown name \"seed\": Cannot find field."}}]'


@pytest.mark.parametrize(
    ("said", "name"),
    [
        (refusal("Unsupported parameter: 'temperature' is not supported with this model."), "temperature"),
        (refusal("'temperature' does not support 0; only the default (1) is supported.", "temperature"), "temperature"),
        (refusal("Unrecognized request argument supplied: seed"), "seed"),
        (refusal("Unrecognized request arguments supplied: top_k, seed"), "seed"),
        (refusal("temperature: Extra inputs are not permitted"), "temperature"),
        (refusal("`temperature` is deprecated for this model."), "temperature"),
        (refusal("[{'type': 'extra_forbidden', 'loc': ('body', 'seed'), 'msg': 'Extra inputs …'}]"), "seed"),
        (refusal("no good", "seed"), "seed"),
        ("raw:422:" + FASTAPI, "seed"),
        ("raw:400:" + GOOGLE, "seed"),
    ],
    ids=range(10),
)
def test_a_parameter_is_left_out_where_a_server_names_it_as_servers_do(said, name):
    wanted = {"seed": 0, "temperature": 0, "max_tokens": 8}
    with StubServer([said, "text"]) as server:
        reply = ask(server, parameters=wanted)

    assert reply.honoured == {key: value for key, value in wanted.items() if key != name}


@pytest.mark.parametrize(
    "said",
    [
        refusal("Cannot read the messages: at what temperature does a seed of caries grow?"),
        refusal("the content 'seed' is not valid", "messages"),
        refusal("temperature: the server is too hot"),
        refusal("'max_tokens' or 'max_completion_tokens' is too large: 9. The maximum context length is 4 tokens."),
        "raw:400:no seed and no temperature",
    ],
    ids=range(5),
)
def test_a_word_of_the_message_is_no_parameter(said):
    with (
        StubServer([said, "text"]) as server,
        Endpoint(server.url, "stub", backoff=0.01) as endpoint,
        pytest.raises(EndpointError, match="status 400"),
    ):
        endpoint.complete(HELLO, seed=0, temperature=0, max_tokens=9)

    assert len(server.requests) == 1


@pytest.mark.parametrize("api", ["openai", "anthropic"])
def test_a_parameter_that_is_refused_for_ever_is_an_error(api):
    said = refusal("Unsupported parameter: 'max_tokens'. Use 'max_completion_tokens' instead.", "max_tokens")
    with (
        StubServer(lambda _: said if len(server.requests) < 20 else "text") as server,
        pytest.raises(EndpointError, match="status 400"),
    ):
        ask(server, api=api, parameters={"max_tokens": 8})

    assert len(server.requests) == (2 if api == "openai" else 1)
    assert api == "openai" or server.requests[0]["max_tokens"] == 8


def test_any_other_bad_request_is_an_error_and_not_asked_otherwise():
    with StubServer(["400"]) as server, pytest.raises(EndpointError, match=r"status 400.*made-up error"):
        ask(server, parameters={"seed": 0, "temperature": 0})

    assert len(server.requests) == 1


def test_anthropic_is_never_sent_a_seed():
    with StubServer() as server:
        reply = ask(server, api="anthropic", parameters={"seed": 0, "temperature": 0, "stop": "END"})

    assert reply.requested["seed"] == 0 and "seed" not in reply.honoured
    assert "seed" not in server.requests[0] and server.requests[0]["stop_sequences"] == ["END"]
    assert server.requests[0]["max_tokens"] > 0, "its API wants one"
    assert server.headers[0]["anthropic-version"] == "2023-06-01" and server.paths == ["/v1/messages"]


def test_images_reach_both_apis_in_their_own_form():
    pixel = "iVBORw0KGgo="
    parts = [
        {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{pixel}"}},
        {"type": "text", "text": "What is seen?"},
    ]
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": parts}]
    with StubServer() as server:
        ask(server, messages)
        ask(server, messages, api="anthropic")

    assert server.requests[0]["messages"] == messages
    assert server.requests[1]["system"] == "Be brief."
    image = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": pixel}}
    assert server.requests[1]["messages"] == [{"role": "user", "content": [image, parts[1]]}]


def test_half_a_character_becomes_one_that_a_file_can_hold():
    with StubServer(answer="a\ud83d b") as server:
        assert ask(server).text == "a\ufffd b"


def test_half_a_character_in_a_name_or_an_error_is_one_that_a_file_can_hold():
    odd = r'{"model": "m\ud83d", "choices": [{"message": {"content": "a"}, "finish_reason": "\udc00"}]}'
    with StubServer(["raw:200:" + odd, r'raw:400:{"error": {"message": "no \ud83d"}}']) as server:
        reply = ask(server)
        with pytest.raises(EndpointError, match="no \ufffd") as caught:
            ask(server)

    assert (reply.model, reply.finish_reason) == ("m\ufffd", "\ufffd")
    assert str(caught.value).encode()


def test_a_key_in_escapes_is_a_key():
    escaped = "".join(f"\\u{ord(letter):04x}" for letter in CANARY)
    with StubServer(['raw:200:{"choices": [{"message": {"content": "' + escaped + '"}}]}']) as server:
        assert ask(server, api_key=CANARY).text == "[key]"


@pytest.mark.parametrize("status", ["200", "400", "500"])
@pytest.mark.parametrize(
    "body", ["[" * 200_000, '{"choices": ' + "9" * 5_000 + "}", "null", '"text"', ""], ids=["deep", "long", 1, 2, 3]
)
def test_no_body_is_more_than_an_error(status, body):
    with StubServer([f"raw:{status}:{body}"]) as server, pytest.raises(EndpointError) as caught:
        ask(server, retries=1)

    assert caught.value.status == int(status)
    assert len(str(caught.value)) < 600


@pytest.mark.parametrize("status", ["200", "500"])
def test_a_body_without_end_is_not_read_to_it(status):
    with (
        StubServer([f"raw:{status}:" + "x" * (17 * 2**20)]) as server,
        pytest.raises(EndpointError, match="larger than 16,777,216 bytes") as caught,
    ):
        ask(server)

    assert len(server.requests) == 1 and caught.value.status == int(status)


@pytest.mark.parametrize("odd", [True, -3, 2.5, "7", None, [1], 10**30], ids=str)
@pytest.mark.parametrize("api", ["openai", "anthropic"])
def test_only_counts_are_counted(api, odd):
    names = ("prompt_tokens", "completion_tokens") if api == "openai" else ("input_tokens", "cache_read_input_tokens")
    usages = [dict(zip(names, (5, odd), strict=True)), {names[0]: odd}, odd]
    answer = {"content": [{"type": "text", "text": "a"}], "choices": [{"message": {"content": "a"}}]}
    with StubServer(["raw:200:" + json.dumps(answer | {"usage": usage}) for usage in usages]) as server:
        first, second, third = (ask(server, api=api).usage for _ in usages)

    if odd == 10**30:
        assert first in ({"input_tokens": 5, "output_tokens": odd}, {"input_tokens": 5 + odd}), "a control"
    else:
        assert (first, second) == ({"input_tokens": 5}, {})
    assert third == {}


def test_threads_share_an_endpoint():
    replies = []
    with StubServer(answer=lambda body: prompt_text(body)) as server, Endpoint(server.url, "stub") as endpoint:

        def ask_one(number: int) -> None:
            replies.append((str(number), endpoint.complete([{"role": "user", "content": str(number)}]).text))

        threads = [threading.Thread(target=ask_one, args=(number,)) for number in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    assert len(replies) == 8 and all(asked == answered for asked, answered in replies)


@pytest.mark.parametrize("act", ["503", "slow", "dripping"])
def test_closing_ends_what_other_threads_ask_and_wait_for(act):
    caught = []
    with StubServer([act], delay=300) as server:
        endpoint = Endpoint(server.url, "stub", backoff=200, timeout=400)

        def ask_one() -> None:
            try:
                endpoint.complete(HELLO)
            except EndpointClosed as error:
                caught.append(str(error))

        thread = threading.Thread(target=ask_one, daemon=True)
        thread.start()
        while not server.requests:
            thread.join(0.01)
        endpoint.close()
        thread.join(30)

        assert not thread.is_alive() and len(caught) == 1
        with pytest.raises(EndpointClosed):
            endpoint.complete(HELLO)


@pytest.mark.parametrize(
    ("given", "used"),
    [
        ("http://localhost:8000", "http://localhost:8000/v1"),
        ("http://localhost:8000/v1/", "http://localhost:8000/v1"),
        ("https://host/api/v2/chat/completions", "https://host/api/v2"),
    ],
)
def test_the_url_may_be_given_in_several_ways(given, used):
    assert Endpoint(given, "m").url == used


@pytest.mark.parametrize(
    "url", [f"http://me:{CANARY}@host/v1", f"http://{CANARY}@host/v1", f"https://host/v1?key={CANARY}"], ids=range(3)
)
def test_a_url_that_holds_a_secret_is_refused_without_quoting_it(url):
    with pytest.raises(EndpointError, match="environment variable") as caught:
        Endpoint(url, "m")

    assert CANARY not in str(caught.value)


@pytest.mark.parametrize("url", ["localhost:8000", "ftp://host/v1", "", "http://"])
def test_what_is_no_url_is_named(url):
    with pytest.raises(EndpointError, match="not the URL of an endpoint"):
        Endpoint(url, "m")


@pytest.mark.parametrize("api", ["openai", "anthropic"])
@pytest.mark.parametrize("act", ["text", "400", "401", "404", "500", "dropped", "truncated", "leak"])
def test_the_key_is_sent_and_nowhere_told(api, act, caplog):
    caplog.set_level(logging.DEBUG)
    script = ["text"] if act == "leak" else [act]
    answer = f"Your key is {CANARY}." if act == "leak" else "Fine."
    with (
        StubServer(script, answer=answer) as server,
        Endpoint(server.url, "stub", api=api, api_key=CANARY, retries=1, backoff=0.01) as endpoint,
    ):
        try:
            told = repr(endpoint.complete(HELLO))
        except EndpointError as error:
            told = "".join(traceback.format_exception(error))
        told += repr(endpoint) + str(endpoint)

    header = server.headers[0]["authorization" if api == "openai" else "x-api-key"]
    assert CANARY in header, "a control: it was sent"
    assert CANARY not in told and CANARY not in caplog.text


def test_a_key_that_no_header_can_carry_is_refused_without_quoting_it():
    with pytest.raises(EndpointError, match="blanks") as caught:
        Endpoint("http://localhost/v1", "m", api_key=f"{CANARY}\nx")

    assert CANARY not in str(caught.value)


def test_a_key_goes_to_its_vendor_or_where_it_is_named_for(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", CANARY)
    monkeypatch.setenv("MY_KEY", "mine-123456")

    assert open_endpoint(None, "m").api_key == CANARY
    assert open_endpoint("https://api.openai.com/v1", "m").api_key == CANARY
    assert open_endpoint("http://localhost:8000/v1", "m").api_key is None
    assert open_endpoint("https://api.openai.com.example.org/v1", "m").api_key is None
    assert open_endpoint("http://localhost:8000/v1", "m", key_variable="MY_KEY").api_key == "mine-123456"
    monkeypatch.delenv("ANTHROPIC_API_KEY", raising=False)
    with pytest.raises(EndpointError, match="ANTHROPIC_API_KEY is not set"):
        open_endpoint(None, "m", api="anthropic")
