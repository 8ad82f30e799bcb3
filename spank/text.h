/* Text of others in our lines: for logs, terminals and the agent. */
#ifndef BOOTSEER_TEXT_H
#define BOOTSEER_TEXT_H

#include <stddef.h>

/*
 * Writes `text` to `shown`, of `size` bytes, so that it stays within its line and moves no terminal: control
 * characters, backslashes and bytes that are no UTF-8 become \n, \\ or \x1b. Text that is too long ends with "...".
 * Returns `shown`.
 */
const char *text_show(const char *text, char *shown, size_t size);

#endif
