#include "text.h"

#include <stdio.h>
#include <string.h>

#define MARK "..."

/* How many bytes the printable character at `c` has; 0 when it is none. */
static size_t printable(const unsigned char *c)
{
	size_t length = c[0] < 0x80 ? 1 : c[0] < 0xc2 ? 0 : c[0] < 0xe0 ? 2 : c[0] < 0xf0 ? 3 : c[0] < 0xf5 ? 4 : 0;

	if (length == 1)
		return c[0] >= 0x20 && c[0] != 0x7f && c[0] != '\\';
	for (size_t i = 1; i < length; i++)
		if ((c[i] & 0xc0) != 0x80)
			return 0;
	if ((c[0] == 0xc2 && c[1] < 0xa0) ||             /* C1 controls: a terminal may obey them */
	    (c[0] == 0xe0 && c[1] < 0xa0) ||             /* longer than needed */
	    (c[0] == 0xed && c[1] >= 0xa0) ||            /* halves of UTF-16 */
	    (c[0] == 0xe2 && c[1] == 0x80 && c[2] >= 0xa8 && c[2] <= 0xaf) || /* line ends, turns of direction */
	    (c[0] == 0xe2 && c[1] == 0x81 && c[2] >= 0xa6 && c[2] <= 0xa9) ||
	    (c[0] == 0xf0 && c[1] < 0x90) || (c[0] == 0xf4 && c[1] >= 0x90))
		return 0;
	return length;
}

const char *text_show(const char *text, char *shown, size_t size)
{
	const unsigned char *in = (const unsigned char *)text;
	size_t out = 0;

	while (*in != '\0') {
		char piece[5];
		size_t taken = printable(in), length;

		if (taken > 0)
			snprintf(piece, sizeof(piece), "%.*s", (int)taken, (const char *)in);
		else if (*in == '\n' || *in == '\\')
			snprintf(piece, sizeof(piece), "\\%c", *in == '\n' ? 'n' : '\\');
		else
			snprintf(piece, sizeof(piece), "\\x%02x", *in);
		length = strlen(piece);
		if (out + length + sizeof(MARK) > size) {
			memcpy(shown + out, MARK, sizeof(MARK));
			return shown;
		}
		memcpy(shown + out, piece, length);
		out += length;
		in += taken > 0 ? taken : 1;
	}
	shown[out] = '\0';
	return shown;
}
